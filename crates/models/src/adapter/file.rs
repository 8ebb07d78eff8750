//! Adapters from files into a plan and back: every module of a file finds its matrix, or the adapter is refused.

use std::{collections::BTreeMap, path::Path};

use qwenkit_formats::{Adapter as File, AdapterModule, AdapterNames, AdapterSettings, AdapterTensor};
use qwenkit_kernels::HeadOrder;

use super::{Adapter, LoraShape, Module};
use crate::{
    error::Error,
    names::BODIES,
    plan::{Mixer, Plan},
};

/// The classifier's head as Hugging Face names it.
const SCORE: &str = "score.weight";

impl Adapter {
    /// The adapter of `file` for the model of `plan`.
    ///
    /// # Errors
    /// When a module or tensor of the file has no place in the model, or another shape there.
    pub fn of_file(plan: &Plan, file: &File) -> Result<Adapter, Error> {
        let places = file.modules.iter().map(|m| place(plan, file.names, m)).collect::<Result<Vec<_>, _>>()?;
        let shape = |(m, (layer, module)): (&AdapterModule, &(usize, Module))| LoraShape {
            layer: *layer,
            module: *module,
            rank: m.rank,
            scale: m.scale,
        };
        let shapes: Vec<_> = file.modules.iter().zip(&places).map(shape).collect();
        let mut labels = None;
        for tensor in &file.whole {
            match tensor.shape[..] {
                [count, width] if tensor.name == SCORE && width == plan.width && count > 0 => labels = Some(count),
                _ => {
                    return Err(Error::Adapter {
                        part: tensor.name.clone(),
                        found: format!("a whole tensor {:?}", tensor.shape),
                        expected: format!(
                            "none but `{SCORE}` (labels, {}); merge the adapter into its base",
                            plan.width
                        ),
                    });
                }
            }
        }
        let mut adapter = Adapter::zeroed(plan, &shapes, labels)?;
        for (m, (layer, module)) in file.modules.iter().zip(places) {
            let Some(lora) = adapter.lora(layer, module).cloned() else { continue };
            turn(&m.a, (m.rank, m.inputs), &mut adapter.values[lora.a()], |row| row);
            let rows = output_row(plan, layer, module);
            let b = &mut adapter.values[lora.b()];
            for output in 0..m.outputs {
                for r in 0..m.rank {
                    b[r * m.outputs + output] = m.b[rows(output) * m.rank + r];
                }
            }
        }
        if let (Some(score), Some(tensor)) = (adapter.score.clone(), file.whole.first()) {
            adapter.values[score.weights()].copy_from_slice(&tensor.values);
        }
        Ok(adapter)
    }

    /// `file` with its modules called as bases of the other form call them, `path` being where it came from.
    ///
    /// # Errors
    /// When a module has no place in the model, or is made of heads that the other form has in another order.
    pub fn in_form(plan: &Plan, file: File, path: &Path, names: AdapterNames) -> Result<File, Error> {
        let from = file.names;
        let mut others = BTreeMap::new();
        for m in &file.modules {
            let (layer, module) = place(plan, from, m)?;
            if RECURRENT.contains(&module) && file_order(plan, names) != file_order(plan, from) {
                let (part, found) = (m.name.clone(), "a module of a recurrent layer".into());
                let expected = "none: the other form has these heads in another order; merge the adapter into its base";
                return Err(Error::Adapter { part, found, expected: expected.into() });
            }
            let (hf, gguf) = module.pair();
            let other = match names {
                AdapterNames::HuggingFace => format!("{}layers.{layer}.{hf}", BODIES[0].0),
                AdapterNames::Gguf => format!("blk.{layer}.{gguf}"),
            };
            others.insert(m.name.clone(), other);
        }
        Ok(file.renamed(path, names, |name| others.get(name).cloned())?)
    }

    /// The adapter as a file has it, with Hugging Face's names. `values` are its numbers, or others in the same order, such
    /// as gradients. Ranks, targets and what is saved whole are filled into `settings`.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn to_file(&self, plan: &Plan, values: &[f32], mut settings: AdapterSettings) -> File {
        assert_eq!(values.len(), self.values.len(), "an adapter's values");
        let mut modules: Vec<AdapterModule> = Vec::with_capacity(self.loras.len());
        for lora in &self.loras {
            let (rank, inputs, outputs) = (lora.rank, lora.inputs, lora.outputs);
            let mut a = vec![0.0; rank * inputs];
            turn(&values[lora.a()], (inputs, rank), &mut a, |row| row);
            let (rows, from) = (output_row(plan, lora.layer, lora.module), &values[lora.b()]);
            let mut b = vec![0.0; rank * outputs];
            for output in 0..outputs {
                for r in 0..rank {
                    b[rows(output) * rank + r] = from[r * outputs + output];
                }
            }
            let name = format!("{}layers.{}.{}", BODIES[0].0, lora.layer, lora.module.pair().0);
            modules.push(AdapterModule { name, inputs, outputs, rank, scale: lora.scale, a, b, magnitude: None });
        }
        modules.sort_by(|x, y| x.name.cmp(&y.name));
        let whole = self.score.as_ref().map(|score| AdapterTensor {
            name: SCORE.to_owned(),
            shape: vec![score.labels, score.width],
            values: values[score.weights()].to_vec(),
        });
        settings.target_modules = Module::ALL
            .into_iter()
            .filter(|module| self.loras.iter().any(|lora| lora.module == *module))
            .map(|module| module.name().to_owned())
            .collect();
        settings.target_modules.sort();
        settings.target_modules.dedup();
        settings.modules_to_save = whole.iter().map(|_| "score".to_owned()).collect();
        let whole = whole.into_iter().collect();
        File { settings, names: AdapterNames::HuggingFace, gguf_architecture: None, modules, whole }
    }
}

/// `to`: (cols, rows) = x: (rows, cols) turned, `row` saying which row of `x` is meant.
fn turn(x: &[f32], (rows, cols): (usize, usize), to: &mut [f32], row: impl Fn(usize) -> usize) {
    for i in 0..rows {
        for (j, x) in x[row(i) * cols..][..cols].iter().enumerate() {
            to[j * rows + i] = *x;
        }
    }
}

/// For each output of a module as the model computes it, its row in files: where an attention has a gate, files have a head's
/// queries, its gate, the next head's queries.
fn output_row(plan: &Plan, layer: usize, module: Module) -> impl Fn(usize) -> usize {
    let gated = match &plan.layers[layer].mixer {
        Mixer::Attention(a) if a.output_gate && module == Module::QProj => Some((a.heads * a.head_dim, a.head_dim)),
        _ => None,
    };
    move |output| match gated {
        None => output,
        Some((queries, dim)) => {
            let (part, i) = (output / queries, output % queries);
            (2 * (i / dim) + part) * dim + i % dim
        }
    }
}

/// The layer that a module's name says, and its path in there.
fn inside(name: &str, names: AdapterNames) -> Option<(usize, &str)> {
    let inner = match names {
        AdapterNames::Gguf => name.strip_prefix("blk."),
        AdapterNames::HuggingFace => {
            BODIES.iter().find_map(|(body, _)| name.strip_prefix(body)?.strip_prefix("layers."))
        }
    };
    let (layer, path) = inner?.split_once('.')?;
    Some((layer.parse().ok()?, path))
}

/// The modules of a recurrent layer that are made of heads.
const RECURRENT: [Module; 5] = [Module::InProjQkv, Module::InProjZ, Module::InProjB, Module::InProjA, Module::OutProj];

/// How an adapter's file orders the value heads of recurrent layers: as the base that its names are of does.
fn file_order(plan: &Plan, names: AdapterNames) -> HeadOrder {
    match names {
        AdapterNames::Gguf if plan.architecture != "qwen3_next" => HeadOrder::Tiled,
        AdapterNames::Gguf | AdapterNames::HuggingFace => HeadOrder::Grouped,
    }
}

/// Where a file's module stands in the plan.
fn place(plan: &Plan, names: AdapterNames, m: &AdapterModule) -> Result<(usize, Module), Error> {
    let wrong = |found: String, expected: String| Error::Adapter { part: m.name.clone(), found, expected };
    let of = |module: &Module| match names {
        AdapterNames::Gguf => module.pair().1,
        AdapterNames::HuggingFace => module.pair().0,
    };
    let found = inside(&m.name, names).and_then(|(layer, path)| {
        // Two modules may have one name in GGUF, in layers of different kinds.
        let module = Module::ALL.into_iter().find(|m| of(m) == path && m.shape(plan, layer).is_some())?;
        Some((layer, module))
    });
    let Some((layer, module)) = found else {
        let expected = format!("a matrix of a {} model with {} layers", plan.architecture, plan.layers.len());
        return Err(wrong("this module".into(), expected));
    };
    if m.magnitude.is_some() {
        return Err(wrong("DoRA".into(), "plain LoRA; merge the adapter into its base to run it".into()));
    }
    if let Mixer::DeltaNet(d) = &plan.layers[layer].mixer
        && RECURRENT.contains(&module)
        && d.shape.order != file_order(plan, names)
    {
        let (own, base) = match names {
            AdapterNames::HuggingFace => ("a checkpoint's", "a checkpoint folder"),
            AdapterNames::Gguf => ("a GGUF file's", "a GGUF file"),
        };
        let found = format!("a module of a recurrent layer whose heads are in {own} order");
        return Err(wrong(found, format!("{base} as the base: this one has its heads in another order")));
    }
    let expected = module.shape(plan, layer);
    if expected != Some((m.inputs, m.outputs)) {
        let (inputs, outputs) = expected.unwrap_or_default();
        let found = format!("a module of {} inputs and {} outputs", m.inputs, m.outputs);
        return Err(wrong(found, format!("{inputs} and {outputs}, as the model has; it is another model's adapter")));
    }
    Ok((layer, module))
}
