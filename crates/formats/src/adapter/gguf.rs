//! GGUF adapters, as llama.cpp's `convert_lora_to_gguf` writes and llama.cpp reads them: tensors `NAME.weight.lora_a`
//! (R, in) and `NAME.weight.lora_b` (out, R), one alpha for all, the scale `alpha / R`.

use std::collections::BTreeMap;
use std::path::Path;

use qwenkit_tensor::DType;

use super::peft::plain_values;
use super::{Adapter, AdapterNames, AdapterSettings, Halves, wrong};
use crate::gguf::{Metadata, TensorSpec, Writer};
use crate::{Error, Gguf};

const ALPHA: &str = "adapter.lora.alpha";

pub(super) fn read(path: &Path) -> Result<Adapter, Error> {
    let gguf = Gguf::open(path)?;
    let meta = gguf.metadata();
    let kinds = (meta.string("general.type")?, meta.string("adapter.type")?);
    if kinds != (Some("adapter"), Some("lora")) {
        return Err(Error::NoAdapter {
            path: path.to_path_buf(),
            found: format!("a GGUF file of type {:?}", kinds.0.unwrap_or("model")),
            hint: "name a LoRA adapter: a PEFT folder, or a .gguf file whose general.type is `adapter`".into(),
        });
    }
    let alpha = f64::from(meta.require_f32(ALPHA)?);
    if !alpha.is_finite() {
        let (path, key) = (path.to_path_buf(), ALPHA.to_owned());
        return Err(Error::KeyType { path, key, found: alpha.to_string(), expected: "a finite number" });
    }
    let settings = AdapterSettings { alpha, ..AdapterSettings::default() };
    let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
    for info in gguf.tensors() {
        let (module, is_a) = match info.name.strip_suffix(".weight.lora_a") {
            Some(module) => (module, true),
            None => match info.name.strip_suffix(".weight.lora_b") {
                Some(module) => (module, false),
                None => {
                    let expected = "a name that ends in `.weight.lora_a` or `.weight.lora_b`".into();
                    return Err(wrong(path, &info.name, "this tensor".into(), expected));
                }
            },
        };
        let mut bytes = vec![0; info.len_bytes];
        gguf.read(info, 0, &mut bytes)?;
        let values = plain_values(info.dtype, &bytes)
            .ok_or_else(|| wrong(path, &info.name, info.dtype.to_string(), "F32, F16 or BF16".into()))?;
        let entry = halves.entry(module.to_owned()).or_default();
        *(if is_a { &mut entry.a } else { &mut entry.b }) = Some((info.shape.clone(), values));
    }
    let modules = halves.into_iter().map(|(name, h)| h.join(path, &name, &settings)).collect::<Result<_, _>>()?;
    let gguf_architecture = meta.string("general.architecture")?.map(str::to_owned);
    Ok(Adapter { settings, names: AdapterNames::Gguf, gguf_architecture, modules, whole: Vec::new() })
}

pub(super) fn write(adapter: &Adapter, path: &Path, architecture: &str) -> Result<(), Error> {
    let refuse = |name: &str, found: &str, expected: &str| Err(wrong(path, name, found.into(), expected.into()));
    let first = adapter.modules.first().map(|m| m.name.as_str()).unwrap_or_default();
    if adapter.names != AdapterNames::Gguf {
        return refuse(first, "Hugging Face names", "GGUF names");
    }
    if let Some(module) = adapter.modules.iter().find(|m| m.magnitude.is_some()) {
        return refuse(
            &module.name,
            "DoRA",
            "plain LoRA: a GGUF adapter has no place for row lengths; merge it instead",
        );
    }
    if let Some(tensor) = adapter.whole.first() {
        return refuse(
            &tensor.name,
            "a whole tensor",
            "LoRA alone: a GGUF adapter has no place for it; merge it instead",
        );
    }
    // The file has one alpha; modules whose scale is not alpha / R have the difference in their B.
    let alpha = adapter.modules.first().map_or(1.0, |m| m.scale * m.rank as f32);
    let mut meta = Metadata::new(path);
    meta.set("general.type", "adapter");
    meta.set("general.architecture", architecture);
    meta.set("adapter.type", "lora");
    meta.set(ALPHA, alpha);
    let mut specs = Vec::new();
    for m in &adapter.modules {
        let spec =
            |part: &str, shape| TensorSpec { name: format!("{}.weight.{part}", m.name), dtype: DType::F32, shape };
        specs.push(spec("lora_a", vec![m.rank, m.inputs]));
        specs.push(spec("lora_b", vec![m.outputs, m.rank]));
    }
    let mut writer = Writer::create(path, &meta, &specs)?;
    for (m, names) in adapter.modules.iter().zip(specs.chunks_exact(2)) {
        let file_scale = alpha / m.rank as f32;
        let factor = if m.scale == file_scale { 1.0 } else { m.scale / file_scale };
        writer.write(&names[0].name, &m.a.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>())?;
        writer.write(&names[1].name, &m.b.iter().flat_map(|x| (x * factor).to_le_bytes()).collect::<Vec<u8>>())?;
    }
    writer.finish().map(|_| ())
}
