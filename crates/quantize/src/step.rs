//! The steps that write a model: quantising, merging, exporting. All end alike: the file is written under a hidden name, the
//! model before and the file behind read the same texts, every tensor is read back, and only then the file gets its name.

use std::path::{Path, PathBuf};

use qwenkit_formats::ModelFiles;
use qwenkit_formats::gguf::{Metadata, TensorSpec, Writer, replace_metadata};
use qwenkit_models::{Ffn, Mixer, Plan, Twins, arch};
use qwenkit_tensor::DType;

use crate::{
    Error,
    choice::{Facts, Kind},
    folder,
    metadata::{self, tower_plan},
    proof::{Before, Moved, Proof, Prover, moved},
    record::{self, Done, record_path},
    tensors::{Renamed, Spec, Stored, Tensors},
    tower,
    unproved::Unproved,
    write::{Importance, Progress, encode},
};

/// What is asked of a step.
pub struct Step<'a> {
    /// The kind of file.
    pub kind: Kind,
    /// The file or folder to write.
    pub out: &'a Path,
    /// What errors count.
    pub importance: &'a Importance,
    /// Threads that encode.
    pub threads: usize,
    /// How the result is proved; not at all where absent.
    pub prover: Option<&'a Prover<'a>>,
}

/// What was written.
#[derive(Clone, Debug, PartialEq)]
pub struct Converted {
    /// The model.
    pub model: PathBuf,
    /// The vision tower's file, where one was written.
    pub tower: Option<PathBuf>,
    /// Bytes of tensors read and written, towers apart.
    pub bytes: (u64, u64),
    /// How many tensors have each type, and their bytes; the largest share first.
    pub types: Vec<(DType, usize, u64)>,
    /// What the proof found.
    pub proof: Option<Proof>,
    /// Why the model's block that guesses tokens (MTP) was left out, where it has one or parts of one.
    pub without_block: Option<String>,
}

/// A step's beginning: what it is called, and what the model answered before it.
pub(crate) struct Start<'a> {
    pub(crate) name: &'static str,
    pub(crate) files: &'a ModelFiles,
    pub(crate) before: Option<Before>,
    /// How far the answers may move where the user does not say, as their mean divergence.
    pub(crate) limit: f64,
}

impl Step<'_> {
    /// Writes the model in `files` as a GGUF file of the step's kind.
    ///
    /// # Errors
    /// When the model is not whole, something in it cannot be said in a GGUF file, writing fails, or the file does not answer
    /// like the model. Nothing is left under the file's name then.
    pub fn quantize(&self, files: &ModelFiles, progress: &mut Progress<'_>) -> Result<Converted, Error> {
        self.check(files, true)?;
        let stored = Box::new(Stored::new(files));
        let tensors: Box<dyn Tensors + '_> = match files {
            ModelFiles::Gguf(_) => stored,
            ModelFiles::Checkpoint(checkpoint) => {
                let twins = Twins::of_checkpoint(checkpoint, &arch::plan(files)?)?;
                Box::new(Renamed::new(stored, twins)?)
            }
        };
        self.check_importance(&*tensors)?;
        let before = self.prover.map(|prover| prover.before(files)).transpose()?;
        let start = Start { name: "quantize", files, limit: self.limit(before.as_ref()), before };
        self.to_gguf(start, &*tensors, progress)
    }

    /// Writes `tensors`, which have GGUF names; everything else is that of the step's model.
    pub(crate) fn to_gguf(
        &self,
        start: Start<'_>,
        tensors: &dyn Tensors,
        progress: &mut Progress<'_>,
    ) -> Result<Converted, Error> {
        let (files, specs) = (start.files, tensors.specs());
        let plan = arch::plan(files)?;
        let mut meta = match files {
            ModelFiles::Gguf(gguf) => self.like(gguf.metadata()),
            ModelFiles::Checkpoint(checkpoint) => {
                metadata::of_checkpoint((files, checkpoint), &plan, specs, self.kind, self.out)?
            }
        };
        let from_gguf = matches!(files, ModelFiles::Gguf(_));
        let types = self.kind.choose(specs, from_gguf, facts(&plan, !self.importance.is_empty()));
        if let Some(before) = &start.before {
            // The place of what is found when the file is there.
            before.place().set(&mut meta);
        }
        let unproved = Unproved::new(self.out);
        write_gguf(tensors, &types, self.importance, self.threads, (unproved.path(), &meta), progress)?;
        let proof = self.prove(&start, tensors, unproved.path())?;
        if let Some(proof) = &proof {
            proof.set(&mut meta);
            replace_metadata(unproved.path(), &meta)?;
        }
        let mut converted = self.converted((start.files, &plan), specs, &types, proof);
        let mut written = vec![unproved];
        if let (ModelFiles::Checkpoint(checkpoint), Some(tower)) = (files, tower_plan(files, &plan)?) {
            let twins = Twins::of_tower(checkpoint, &tower)?;
            let tensors = Renamed::new(Box::new(Stored::new(files)), twins)?;
            let path = tower_path(self.out);
            let dtype = if self.kind.base().is_quantized() { DType::F16 } else { self.kind.base() };
            let meta = tower::metadata(checkpoint, &tower, tensors.specs(), dtype, &path)?;
            let types = tower::types(tensors.specs(), dtype);
            let unproved = Unproved::new(&path);
            let to = (unproved.path(), &meta);
            write_gguf(&tensors, &types, &Importance::new(), self.threads, to, &mut |_, _| {})?;
            if self.prover.is_some() {
                let proof = Proof { moved: self.moved(&tensors, unproved.path())?, ..Proof::default() };
                self.judge(start.name, &proof, "the tower's tensors are not those of the checkpoint")?;
            }
            converted.tower = Some(path);
            written.push(unproved);
        }
        let sums = written.iter().map(|file| (file.name(), file.path().to_path_buf())).collect::<Vec<_>>();
        let record = self.record(&start, converted.proof.as_ref(), &record_path(self.out), &sums)?;
        written.into_iter().chain(record).try_for_each(Unproved::finish)?;
        Ok(converted)
    }

    /// Writes `tensors`, which have a checkpoint's names, as a folder that does not exist yet.
    pub(crate) fn to_folder(
        &self,
        start: Start<'_>,
        tensors: &dyn Tensors,
        progress: &mut Progress<'_>,
    ) -> Result<Converted, Error> {
        let dtype = self.kind.base();
        // Numbers that are not weights stay what they are.
        let type_of = |spec: &Spec| if qwenkit_kernels::is_weight_type(spec.dtype) { dtype } else { spec.dtype };
        let types: Vec<DType> = tensors.specs().iter().map(type_of).collect();
        let unproved = Unproved::new(self.out);
        std::fs::create_dir_all(unproved.path()).map_err(Error::io("create", unproved.path()))?;
        folder::companions(start.files, dtype, unproved.path())?;
        folder::weights(tensors, &types, self.threads, unproved.path(), progress)?;
        let proof = self.prove(&start, tensors, unproved.path())?;
        let converted = self.converted((start.files, &arch::plan(start.files)?), tensors.specs(), &types, proof);
        let record = unproved.path().join(record::IN_FOLDER);
        let files = record::files_of(unproved.path())?;
        let record = self.record(&start, converted.proof.as_ref(), &record, &files)?;
        record.into_iter().chain([unproved]).try_for_each(Unproved::finish)?;
        Ok(converted)
    }

    /// What answers may differ in this step; a step without a proof has no use for it.
    pub(crate) fn limit(&self, before: Option<&Before>) -> f64 {
        before.map_or(f64::INFINITY, |before| self.kind.limit(before.width, before.rounded))
    }

    /// Compares what lies at `path` with the model before.
    fn prove(&self, start: &Start<'_>, tensors: &dyn Tensors, path: &Path) -> Result<Option<Proof>, Error> {
        let (Some(prover), Some(before)) = (self.prover, &start.before) else { return Ok(None) };
        let mut proof = prover.compare(before, &ModelFiles::open(path)?, start.limit)?;
        proof.moved = self.moved(tensors, path)?;
        self.judge(start.name, &proof, &proof.in_words())?;
        Ok(Some(proof))
    }

    fn moved(&self, tensors: &dyn Tensors, path: &Path) -> Result<Vec<Moved>, Error> {
        let files = ModelFiles::open(path)?;
        moved(tensors, &Stored::new(&files), self.threads)
    }

    fn judge(&self, step: &'static str, proof: &Proof, found: &str) -> Result<(), Error> {
        if proof.holds() {
            return Ok(());
        }
        let name = |m: &Moved| format!("`{}` ({}, {:.1e} of its squares)", m.name, m.dtype, m.relative);
        Err(Error::NotProved {
            step,
            out: self.out.to_path_buf(),
            found: found.to_owned(),
            moved: proof.moved.iter().take(3).map(name).collect::<Vec<_>>().join(", "),
        })
    }

    /// The proof's record, which gets the name `path` when the model has its own, with the checksums of `files`. A step without
    /// proof takes an older record away.
    fn record(
        &self,
        start: &Start<'_>,
        proof: Option<&Proof>,
        path: &Path,
        files: &[(String, PathBuf)],
    ) -> Result<Option<Unproved>, Error> {
        let Some(proof) = proof else {
            if path.is_file() {
                std::fs::remove_file(path).map_err(Error::io("remove", path))?;
            }
            return Ok(None);
        };
        let (before, after) = (start.files.path(), self.out);
        let done = Done { step: start.name, kind: self.kind.name(), before, after, proof };
        let record = Unproved::new(path);
        record::write(record.path(), &done, files)?;
        Ok(Some(record))
    }

    /// A file's metadata for one of this kind, without an earlier proof's.
    fn like(&self, found: &Metadata) -> Metadata {
        let mut meta = Metadata::new(self.out);
        for (key, value) in found.iter().filter(|(key, _)| !key.starts_with("qwenkit.proof.")) {
            meta.set(key, value.clone());
        }
        meta.set("general.file_type", self.kind.file_type());
        meta.set("general.quantization_version", 2_u32);
        meta
    }

    fn converted(
        &self,
        (files, plan): (&ModelFiles, &Plan),
        specs: &[Spec],
        types: &[DType],
        proof: Option<Proof>,
    ) -> Converted {
        let size = |spec: &Spec, dtype: DType| dtype.tensor_bytes(&spec.shape).unwrap_or(0) as u64;
        let mut counts: Vec<(DType, usize, u64)> = Vec::new();
        for (spec, &dtype) in specs.iter().zip(types) {
            match counts.iter_mut().find(|(known, _, _)| *known == dtype) {
                Some(entry) => (entry.1, entry.2) = (entry.1 + 1, entry.2 + size(spec, dtype)),
                None => counts.push((dtype, 1, size(spec, dtype))),
            }
        }
        counts.sort_by_key(|(_, _, bytes)| std::cmp::Reverse(*bytes));
        let read = specs.iter().map(|spec| size(spec, spec.dtype)).sum();
        let written = counts.iter().map(|(_, _, bytes)| bytes).sum();
        let of_block = |spec: &Spec| spec.name.starts_with("mtp.") || spec.name.contains(".nextn.");
        let without_block = match plan.mtp {
            _ if specs.iter().any(of_block) => None,
            Some(_) => Some("other programs would take it for a layer".to_owned()),
            None => arch::mtp_gap(files, plan).map(|found| format!("found {found}")),
        };
        let (model, bytes) = (self.out.to_path_buf(), (read, written));
        Converted { model, tower: None, bytes, types: counts, proof, without_block }
    }

    /// Importance of another model would be left out, or weigh the wrong columns.
    fn check_importance(&self, tensors: &dyn Tensors) -> Result<(), Error> {
        let mut of_model = 0;
        for spec in tensors.specs() {
            let Some(weights) = self.importance.get(&spec.name) else { continue };
            of_model += 1;
            let matrices = if spec.shape.len() > 2 { spec.shape[0] } else { 1 };
            if ![spec.cols(), spec.cols() * matrices].contains(&weights.len()) {
                let (what, expected) = (format!("the importance of `{}`", spec.name), format!("{}", spec.cols()));
                let found = format!("{} numbers", weights.len());
                return Err(metadata::unsayable(tensors.path(), &what, found, &expected));
            }
        }
        if of_model == 0 && !self.importance.is_empty() {
            let expected = "one that names tensors of this model";
            return Err(metadata::unsayable(tensors.path(), "the importance matrix", "one of another model", expected));
        }
        Ok(())
    }

    /// What can be refused before any work: a model must not become its own victim and must be the one that its proof speaks of,
    /// and the output must be able to be what it is to be.
    pub(crate) fn check(&self, files: &ModelFiles, to_gguf: bool) -> Result<(), Error> {
        if to_gguf && (self.out.is_dir() || self.out.file_name().is_none()) {
            let expected = "the name of a file, as in model.gguf";
            return Err(metadata::unsayable(self.out, "the output", "a folder", expected));
        }
        if !to_gguf && self.kind.base().is_quantized() {
            let expected = "F32, F16 or BF16 in a checkpoint folder; name a .gguf file for a quantised model";
            return Err(metadata::unsayable(self.out, "the type", self.kind.name(), expected));
        }
        record::check(files)?;
        let Ok(out) = self.out.canonicalize() else { return Ok(()) };
        let same = |path: &Path| path.canonicalize().is_ok_and(|path| path == out);
        let is_input = match files {
            ModelFiles::Gguf(gguf) => gguf.parts().any(same),
            ModelFiles::Checkpoint(checkpoint) => same(checkpoint.path()) || checkpoint.parts().any(same),
        };
        match is_input {
            true => Err(Error::SamePath { path: self.out.to_path_buf() }),
            false if !to_gguf => {
                Err(metadata::unsayable(self.out, "the folder", "there already", "a name that is free"))
            }
            false => Ok(()),
        }
    }
}

/// Where a model's tower goes: beside it, where it is found again.
fn tower_path(model: &Path) -> PathBuf {
    let name = model.file_name().unwrap_or_default().to_string_lossy();
    model.with_file_name(format!("mmproj-{name}"))
}

fn facts(plan: &Plan, has_importance: bool) -> Facts<'static> {
    let attention = plan.layers.iter().find_map(|layer| match &layer.mixer {
        Mixer::Attention(a) => Some(a),
        Mixer::DeltaNet(_) => None,
    });
    let experts = plan.layers.iter().find_map(|layer| match layer.ffn {
        Ffn::Moe(moe) => Some(moe.router.experts),
        Ffn::Dense { .. } => None,
    });
    Facts {
        architecture: arch::gguf_name(plan.architecture).unwrap_or_default(),
        layers: plan.layers.len(),
        heads_per_key: attention.map_or(1, |a| a.heads / a.kv_heads.max(1)),
        experts: experts.unwrap_or(0),
        tied: plan.tied,
        has_importance,
    }
}

/// Writes tensors in their types to a GGUF file.
fn write_gguf(
    tensors: &dyn Tensors,
    types: &[DType],
    importance: &Importance,
    threads: usize,
    (path, meta): (&Path, &Metadata),
    progress: &mut Progress<'_>,
) -> Result<(), Error> {
    let specs = specs_in(tensors, types);
    let mut writer = Writer::create(path, meta, &specs)?;
    encode(tensors, types, importance, threads, progress, &mut |tensor, bytes| {
        Ok(writer.write(&specs[tensor].name, bytes)?)
    })?;
    writer.finish()?;
    Ok(())
}

/// The tensors as they will be written.
pub(crate) fn specs_in(tensors: &dyn Tensors, types: &[DType]) -> Vec<TensorSpec> {
    let spec =
        |(spec, &dtype): (&Spec, &DType)| TensorSpec { name: spec.name.clone(), dtype, shape: spec.shape.clone() };
    tensors.specs().iter().zip(types).map(spec).collect()
}
