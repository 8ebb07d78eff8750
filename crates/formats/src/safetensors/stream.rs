//! Writes the weights of a checkpoint folder tensor by tensor: `model.safetensors`, or shards with their index where it would
//! be larger than a limit. Data are streamed by the caller, in the order of the list.
//!
//! All files appear under their names when all are whole.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value, json};

use super::TYPES;
use crate::Error;
use crate::atomic_file::AtomicFile;
use crate::gguf::TensorSpec;

/// Writes tensors in order.
pub struct ShardWriter {
    dir: PathBuf,
    specs: Vec<TensorSpec>,
    sizes: Vec<u64>,
    /// How many tensors each shard has.
    counts: Vec<usize>,
    files: Vec<AtomicFile>,
    next: usize,
    done_bytes: u64,
    left_in_shard: usize,
}

impl ShardWriter {
    /// Begins the weights of the folder `dir`, which exists. A single tensor larger than `max_bytes` gets a shard of its own.
    ///
    /// # Errors
    /// When a type or shape cannot be said in safetensors, a name comes twice, or the file cannot be made.
    pub fn create(dir: &Path, specs: &[TensorSpec], max_bytes: u64) -> Result<ShardWriter, Error> {
        let mut names = std::collections::HashSet::new();
        let mut sizes = Vec::with_capacity(specs.len());
        let (mut counts, mut bytes) = (vec![0], 0_u64);
        for spec in specs {
            let invalid = |found: String, expected: String| Error::WriteInvalid {
                path: dir.to_path_buf(),
                thing: format!("tensor `{}`", spec.name),
                found,
                expected,
            };
            if !names.insert(spec.name.as_str()) {
                return Err(Error::DuplicateTensor { path: dir.to_path_buf(), tensor: spec.name.clone() });
            }
            if !TYPES.iter().any(|(_, ours)| *ours == spec.dtype) || spec.name == "__metadata__" {
                let expected = format!("one of {}", TYPES.map(|(_, ours)| ours.name()).join(", "));
                return Err(invalid(format!("type {}", spec.dtype), expected));
            }
            let size = spec.dtype.tensor_bytes(&spec.shape);
            let size =
                size.ok_or_else(|| invalid(format!("shape {:?}", spec.shape), "a size that fits".into()))? as u64;
            if bytes > 0 && bytes + size > max_bytes {
                counts.push(0);
                bytes = 0;
            }
            *counts.last_mut().unwrap_or(&mut 0) += 1;
            bytes += size;
            sizes.push(size);
        }
        let mut writer = ShardWriter {
            dir: dir.to_path_buf(),
            specs: specs.to_vec(),
            sizes,
            counts,
            files: Vec::new(),
            next: 0,
            done_bytes: 0,
            left_in_shard: 0,
        };
        writer.begin_shard()?;
        Ok(writer)
    }

    /// Appends data of tensor `name`, which must be the next in order that is not complete.
    ///
    /// # Errors
    /// When it is another tensor's turn, there are too many bytes, or writing fails.
    pub fn write(&mut self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let expected = self.specs.get(self.next).map(|spec| spec.name.as_str());
        if expected != Some(name) {
            let expected = expected.map_or("the end of the model".into(), |name| format!("tensor `{name}`"));
            return Err(Error::WriteOrder { path: self.dir.clone(), found: name.into(), expected });
        }
        let size = self.sizes[self.next];
        let found = self.done_bytes + bytes.len() as u64;
        if found > size {
            let (path, tensor) = (self.dir.clone(), name.to_owned());
            return Err(Error::WriteLength { path, tensor, found: found.into(), expected: size });
        }
        if self.left_in_shard == 0 {
            self.begin_shard()?;
        }
        if let Some(file) = self.files.last_mut() {
            file.write(bytes)?;
        }
        self.done_bytes = found;
        if found == size {
            self.next += 1;
            self.done_bytes = 0;
            self.left_in_shard -= 1;
        }
        Ok(())
    }

    /// Gives all files their names and returns them, the index last if there is one.
    ///
    /// # Errors
    /// When data are missing, or writing fails.
    pub fn finish(mut self) -> Result<Vec<PathBuf>, Error> {
        if let (Some(spec), Some(&expected)) = (self.specs.get(self.next), self.sizes.get(self.next)) {
            let (path, tensor) = (self.dir.clone(), spec.name.clone());
            return Err(Error::WriteLength { path, tensor, found: self.done_bytes.into(), expected });
        }
        for file in &mut self.files {
            file.sync()?;
        }
        if self.counts.len() > 1 {
            let mut index = AtomicFile::create(&self.dir.join("model.safetensors.index.json"))?;
            index.write(format!("{:#}\n", self.index()).as_bytes())?;
            self.files.push(index);
        }
        let finish = |file: AtomicFile| {
            let path = file.final_path().to_path_buf();
            file.finish().map(|()| path)
        };
        self.files.into_iter().map(finish).collect()
    }

    fn shard_name(&self, shard: usize) -> String {
        match self.counts.len() {
            1 => "model.safetensors".into(),
            count => format!("model-{:05}-of-{count:05}.safetensors", shard + 1),
        }
    }

    fn begin_shard(&mut self) -> Result<(), Error> {
        let shard = self.files.len();
        let Some(&count) = self.counts.get(shard) else { return Ok(()) };
        let mut header = Map::new();
        header.insert("__metadata__".into(), json!({"format": "pt"}));
        let mut start = 0_u64;
        for (spec, size) in self.specs.iter().zip(&self.sizes).skip(self.next).take(count) {
            let theirs = TYPES.iter().find(|(_, ours)| *ours == spec.dtype).map(|(theirs, _)| *theirs);
            let entry = json!({"dtype": theirs, "shape": spec.shape, "data_offsets": [start, start + size]});
            header.insert(spec.name.clone(), entry);
            start += size;
        }
        let mut text = Value::Object(header).to_string().into_bytes();
        // Spaces up to a multiple of 8, so that data begin aligned.
        text.resize(text.len().next_multiple_of(8), b' ');
        let mut file = AtomicFile::create(&self.dir.join(self.shard_name(shard)))?;
        file.write(&(text.len() as u64).to_le_bytes())?;
        file.write(&text)?;
        self.files.push(file);
        self.left_in_shard = count;
        Ok(())
    }

    fn index(&self) -> Value {
        let mut map = Map::new();
        let mut names = self.specs.iter();
        for (shard, &count) in self.counts.iter().enumerate() {
            for spec in names.by_ref().take(count) {
                map.insert(spec.name.clone(), json!(self.shard_name(shard)));
            }
        }
        json!({"metadata": {"total_size": self.sizes.iter().sum::<u64>()}, "weight_map": map})
    }
}
