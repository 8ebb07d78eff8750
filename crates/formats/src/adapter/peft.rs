//! PEFT folders. Tensors are called `base_model.model.` + module path + `.lora_A.weight`, or the same with the name of the
//! adapter inside (`.lora_A.default.weight`, as some trainers leave it).

use std::collections::BTreeMap;
use std::path::Path;

use half::{bf16, f16};
use qwenkit_tensor::DType;

use super::settings::is_end;
use super::{Adapter, AdapterNames, AdapterSettings, AdapterTensor, CONFIG, Halves, WEIGHTS, wrong};
use crate::atomic_file::AtomicFile;
use crate::{Error, SafetensorsFile, TensorInfo, read_safetensors_file, write_safetensors};

/// What PEFT puts in front of the base model's paths.
const PREFIX: &str = "base_model.model.";

pub(super) fn read(dir: &Path) -> Result<Adapter, Error> {
    let no_adapter = |found: &str, hint: &str| Error::NoAdapter {
        path: dir.to_path_buf(),
        found: found.to_owned(),
        hint: hint.to_owned(),
    };
    let (config, weights) = (dir.join(CONFIG), dir.join(WEIGHTS));
    if !config.is_file() {
        return Err(match dir.join("config.json").is_file() {
            true => {
                no_adapter("a whole model (config.json)", "name it as the model; an adapter has adapter_config.json")
            }
            false => no_adapter("no adapter_config.json", "name the folder that the trainer wrote the adapter to"),
        });
    }
    if !weights.is_file() {
        return Err(match dir.join("adapter_model.bin").is_file() {
            true => no_adapter(
                "weights as a Python pickle (adapter_model.bin)",
                "pickles can run code when opened and are not read; save the adapter as safetensors",
            ),
            false => no_adapter("adapter_config.json without weights", "fetch adapter_model.safetensors too"),
        });
    }
    let settings = AdapterSettings::read(&config)?;
    let file = read_safetensors_file(&weights)?;
    for (key, found) in facts(&settings) {
        // Weights that were written here say what they were trained with.
        if let Some(expected) = file.metadata().get(key).filter(|expected| **expected != found) {
            let expected = format!("{expected}, which the weights were written with");
            return Err(wrong(&config, key, found, expected));
        }
    }
    let mut halves: BTreeMap<String, Halves> = BTreeMap::new();
    let mut whole = Vec::new();
    for info in file.tensors() {
        let name = info.name.strip_prefix(PREFIX).ok_or_else(|| {
            wrong(&weights, &info.name, "a name without PEFT's beginning".into(), format!("`{PREFIX}` in front of it"))
        })?;
        let values = values(&weights, &file, info)?;
        if let Some((module, part)) = part_of(name) {
            let entry = halves.entry(module.to_owned()).or_default();
            let slot = match part {
                Part::A => &mut entry.a,
                Part::B => &mut entry.b,
                Part::Magnitude => &mut entry.magnitude,
            };
            if slot.replace((info.shape.clone(), values)).is_some() {
                return Err(wrong(
                    &weights,
                    &info.name,
                    "it twice".into(),
                    "one tensor for each half of a module".into(),
                ));
            }
        } else if settings.modules_to_save.iter().any(|m| name.rsplit_once('.').is_some_and(|(n, _)| is_end(n, m))) {
            whole.push(AdapterTensor { name: name.to_owned(), shape: info.shape.clone(), values });
        } else {
            let expected = "lora_A, lora_B or lora_magnitude_vector of a module, or one of modules_to_save".into();
            return Err(wrong(&weights, &info.name, "this tensor".into(), expected));
        }
    }
    for target in &settings.target_modules {
        if !halves.keys().any(|module| is_end(module, target)) {
            let expected = format!("tensors of a module `{target}`, which target_modules of {CONFIG} names");
            return Err(wrong(&weights, target, "none".into(), expected));
        }
    }
    let stray = halves.keys().find(|m| !settings.target_modules.iter().any(|t| is_end(m, t)));
    if let Some(stray) = stray.filter(|_| !settings.target_modules.is_empty()) {
        let expected = format!("only modules that target_modules of {CONFIG} names");
        return Err(wrong(&weights, stray, "a module that it does not name".into(), expected));
    }
    if halves.is_empty() && whole.is_empty() {
        return Err(no_adapter("no tensors in adapter_model.safetensors", "fetch the adapter again"));
    }
    let modules = halves.into_iter().map(|(name, h)| h.join(&weights, &name, &settings)).collect::<Result<_, _>>()?;
    whole.sort_by(|x, y| x.name.cmp(&y.name));
    Ok(Adapter { settings, names: AdapterNames::HuggingFace, gguf_architecture: None, modules, whole })
}

/// The settings that the weights mean nothing without.
fn facts(settings: &AdapterSettings) -> [(&'static str, String); 2] {
    [("lora_alpha", settings.alpha.to_string()), ("use_rslora", settings.use_rslora.to_string())]
}

/// Which part of a module a tensor is.
enum Part {
    A,
    B,
    Magnitude,
}

/// The module and part that a tensor's name says.
fn part_of(name: &str) -> Option<(&str, Part)> {
    let (module, rest) = name.split_once(".lora_")?;
    let named = |part: &str| {
        rest == format!("{part}.weight")
            || rest.strip_prefix(part).and_then(|r| r.strip_suffix(".weight")).is_some_and(|adapter| {
                adapter.strip_prefix('.').is_some_and(|adapter| !adapter.is_empty() && !adapter.contains('.'))
            })
    };
    if named("A") {
        return Some((module, Part::A));
    }
    if named("B") {
        return Some((module, Part::B));
    }
    (rest == "magnitude_vector" || named("magnitude_vector")).then_some((module, Part::Magnitude))
}

/// All values of a plain tensor.
fn values(path: &Path, file: &SafetensorsFile, info: &TensorInfo) -> Result<Vec<f32>, Error> {
    let mut bytes = vec![0; info.len_bytes];
    file.read(info, 0, &mut bytes)?;
    plain_values(info.dtype, &bytes)
        .ok_or_else(|| wrong(path, &info.name, info.dtype.to_string(), "F32, F16 or BF16".into()))
}

/// The values of plain floating-point bytes; `None` for other types.
pub(super) fn plain_values(dtype: DType, bytes: &[u8]) -> Option<Vec<f32>> {
    Some(match dtype {
        DType::F32 => bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        DType::F16 => bytes.as_chunks().0.iter().map(|b| f16::from_le_bytes(*b).to_f32()).collect(),
        DType::BF16 => bytes.as_chunks().0.iter().map(|b| bf16::from_le_bytes(*b).to_f32()).collect(),
        _ => return None,
    })
}

pub(super) fn write(adapter: &Adapter, dir: &Path, remarks: &BTreeMap<String, String>) -> Result<(), Error> {
    if adapter.names != AdapterNames::HuggingFace {
        let name = adapter.modules.first().map(|m| m.name.clone()).unwrap_or_default();
        return Err(wrong(dir, &name, "names of a GGUF file".into(), "Hugging Face names".into()));
    }
    std::fs::create_dir_all(dir).map_err(|source| Error::Io { action: "create", path: dir.to_path_buf(), source })?;
    let mut tensors: Vec<(String, Vec<usize>, &[f32])> = Vec::new();
    for m in &adapter.modules {
        let name = |part: &str| format!("{PREFIX}{}.{part}", m.name);
        tensors.push((name("lora_A.weight"), vec![m.rank, m.inputs], &m.a));
        tensors.push((name("lora_B.weight"), vec![m.outputs, m.rank], &m.b));
        if let Some(magnitude) = &m.magnitude {
            tensors.push((name("lora_magnitude_vector"), vec![m.outputs], magnitude));
        }
    }
    for t in &adapter.whole {
        tensors.push((format!("{PREFIX}{}", t.name), t.shape.clone(), &t.values));
    }
    let bytes: Vec<Vec<u8>> = tensors.iter().map(|t| t.2.iter().flat_map(|x| x.to_le_bytes()).collect()).collect();
    let list: Vec<(&str, DType, &[usize], &[u8])> = tensors
        .iter()
        .zip(&bytes)
        .map(|((name, shape, _), bytes)| (name.as_str(), DType::F32, shape.as_slice(), bytes.as_slice()))
        .collect();
    let mut all = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    all.extend(facts(&adapter.settings).map(|(key, value)| (key.to_owned(), value)));
    all.extend(remarks.iter().map(|(k, v)| (k.clone(), v.clone())));
    write_safetensors(&dir.join(WEIGHTS), &list, &all)?;
    let rank = adapter.modules.iter().map(|m| m.rank).max().unwrap_or(1);
    let mut config = AtomicFile::create(&dir.join(CONFIG))?;
    config.write(adapter.settings.to_json(rank).as_bytes())?;
    config.finish()
}
