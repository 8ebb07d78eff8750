//! Adapters from files into a plan and back: every module of a file finds its matrix, or the adapter is refused. The value heads
//! of recurrent layers have another order in most GGUF files than in checkpoints; an adapter of either form is brought into the
//! order of its model.

use std::{collections::BTreeMap, path::Path};

use qwenkit_formats::{Adapter as File, AdapterModule, AdapterNames, AdapterSettings, AdapterTensor};
use qwenkit_kernels::HeadOrder;

use super::{Adapter, LoraShape, Module};
use crate::{
    error::Error,
    names::BODIES,
    plan::{DeltaNetPlan, Mixer, Plan},
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
            magnitudes: m.magnitude.is_some(),
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
            let order = file_order(plan, file.names);
            let columns = input_column(plan, (layer, module), order);
            let a = &mut adapter.values[lora.a()];
            for (input, a) in a.chunks_exact_mut(m.rank).enumerate() {
                let column = columns(input);
                a.iter_mut().enumerate().for_each(|(r, a)| *a = m.a[r * m.inputs + column]);
            }
            let rows = output_row(plan, (layer, module), order);
            let b = &mut adapter.values[lora.b()];
            for output in 0..m.outputs {
                for r in 0..m.rank {
                    b[r * m.outputs + output] = m.b[rows(output) * m.rank + r];
                }
            }
            if let (Some(range), Some(magnitude)) = (lora.magnitudes(), &m.magnitude) {
                let to = adapter.values[range].iter_mut().enumerate();
                to.for_each(|(output, to)| *to = magnitude[rows(output)]);
            }
        }
        if let (Some(score), Some(tensor)) = (adapter.score.clone(), file.whole.first()) {
            adapter.values[score.weights()].copy_from_slice(&tensor.values);
        }
        Ok(adapter)
    }

    /// `file` with its modules called as bases of the other form call them, and in the order in which that form has them; `path`
    /// is where it came from.
    ///
    /// # Errors
    /// When a module has no place in the model.
    pub fn in_form(plan: &Plan, mut file: File, path: &Path, names: AdapterNames) -> Result<File, Error> {
        let from = file.names;
        let (was, wanted) = (file_order(plan, from), file_order(plan, names));
        let mut others = BTreeMap::new();
        for m in &mut file.modules {
            let (layer, module) = place(plan, from, m)?;
            if was != wanted {
                let of = |f: fn(&DeltaNetPlan, Module) -> Option<Heads>| match &plan.layers[layer].mixer {
                    Mixer::DeltaNet(delta) => f(delta, module),
                    Mixer::Attention(_) => None,
                };
                if let Some(heads) = of(input_heads) {
                    let a = m.a.clone();
                    for (to, from) in m.a.chunks_exact_mut(m.inputs).zip(a.chunks_exact(m.inputs)) {
                        to.iter_mut().enumerate().for_each(|(i, to)| *to = from[heads.place(i, wanted, was)]);
                    }
                }
                if let Some(heads) = of(output_heads) {
                    let b = m.b.clone();
                    for (i, to) in m.b.chunks_exact_mut(m.rank).enumerate() {
                        to.copy_from_slice(&b[heads.place(i, wanted, was) * m.rank..][..m.rank]);
                    }
                    if let Some(magnitude) = &mut m.magnitude {
                        let from = magnitude.clone();
                        magnitude.iter_mut().enumerate().for_each(|(i, to)| *to = from[heads.place(i, wanted, was)]);
                    }
                }
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
    /// as gradients. Targets, magnitudes and what is saved whole are filled into `settings`.
    ///
    /// # Panics
    /// If there are not as many values.
    pub fn to_file(&self, plan: &Plan, values: &[f32], mut settings: AdapterSettings) -> File {
        assert_eq!(values.len(), self.values.len(), "an adapter's values");
        let mut modules: Vec<AdapterModule> = Vec::with_capacity(self.loras.len());
        for lora in &self.loras {
            let (rank, inputs, outputs) = (lora.rank, lora.inputs, lora.outputs);
            let (at, order) = ((lora.layer, lora.module), file_order(plan, AdapterNames::HuggingFace));
            let mut a = vec![0.0; rank * inputs];
            let columns = input_column(plan, at, order);
            for (input, from) in values[lora.a()].chunks_exact(rank).enumerate() {
                let column = columns(input);
                from.iter().enumerate().for_each(|(r, from)| a[r * inputs + column] = *from);
            }
            let (rows, from) = (output_row(plan, at, order), &values[lora.b()]);
            let mut b = vec![0.0; rank * outputs];
            for output in 0..outputs {
                for r in 0..rank {
                    b[rows(output) * rank + r] = from[r * outputs + output];
                }
            }
            let magnitude = lora.magnitudes().map(|range| {
                let mut magnitude = vec![0.0; outputs];
                values[range].iter().enumerate().for_each(|(output, x)| magnitude[rows(output)] = *x);
                magnitude
            });
            let name = format!("{}layers.{}.{}", BODIES[0].0, lora.layer, lora.module.pair().0);
            modules.push(AdapterModule { name, inputs, outputs, rank, scale: lora.scale, a, b, magnitude });
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
        settings.use_dora = self.has_magnitudes();
        settings.modules_to_save = whole.iter().map(|_| "score".to_owned()).collect();
        let whole = whole.into_iter().collect();
        File { settings, names: AdapterNames::HuggingFace, gguf_architecture: None, modules, whole }
    }
}

/// For each output of a module as the model computes it, its row in files of this order: where an attention has a gate, files
/// have a head's queries, its gate, the next head's queries.
fn output_row(plan: &Plan, (layer, module): (usize, Module), order: HeadOrder) -> impl Fn(usize) -> usize {
    let (mut gated, mut turned) = (None, None);
    match &plan.layers[layer].mixer {
        Mixer::Attention(a) if a.output_gate && module == Module::QProj => {
            gated = Some((a.heads * a.head_dim, a.head_dim));
        }
        Mixer::Attention(_) => {}
        Mixer::DeltaNet(d) => turned = output_heads(d, module).map(|heads| (heads, d.shape.order)),
    }
    move |output| match (gated, turned) {
        (Some((queries, dim)), _) => {
            let (part, i) = (output / queries, output % queries);
            (2 * (i / dim) + part) * dim + i % dim
        }
        (None, Some((heads, own))) => heads.place(output, own, order),
        (None, None) => output,
    }
}

/// For each input of a module as the model computes it, its column in files of this order.
fn input_column(plan: &Plan, (layer, module): (usize, Module), order: HeadOrder) -> impl Fn(usize) -> usize {
    let turned = match &plan.layers[layer].mixer {
        Mixer::DeltaNet(d) => input_heads(d, module).map(|heads| (heads, d.shape.order)),
        Mixer::Attention(_) => None,
    };
    move |input| turned.map_or(input, |(heads, own)| heads.place(input, own, order))
}

/// Value heads along an axis of a recurrent layer's matrix.
#[derive(Clone, Copy)]
struct Heads {
    /// What stands before them.
    first: usize,
    /// Values of each.
    dim: usize,
    key_heads: usize,
    value_heads: usize,
}

impl Heads {
    /// Where an element stands in one order that stands at `i` in another.
    fn place(&self, i: usize, from: HeadOrder, to: HeadOrder) -> usize {
        let Some(inner) = i.checked_sub(self.first).filter(|_| from != to) else { return i };
        let (head, group) = (inner / self.dim, self.value_heads / self.key_heads);
        let head = match to {
            HeadOrder::Grouped => head % self.key_heads * group + head / self.key_heads,
            HeadOrder::Tiled => head % group * self.key_heads + head / group,
        };
        self.first + head * self.dim + inner % self.dim
    }
}

fn output_heads(delta: &DeltaNetPlan, module: Module) -> Option<Heads> {
    let shape = delta.shape;
    let (first, dim) = match module {
        Module::InProjQkv => (shape.channels() - shape.value_width(), shape.value_dim),
        Module::InProjZ => (0, shape.value_dim),
        Module::InProjB | Module::InProjA => (0, 1),
        _ => return None,
    };
    Some(Heads { first, dim, key_heads: shape.key_heads, value_heads: shape.value_heads })
}

fn input_heads(delta: &DeltaNetPlan, module: Module) -> Option<Heads> {
    let shape = delta.shape;
    let heads = Heads { first: 0, dim: shape.value_dim, key_heads: shape.key_heads, value_heads: shape.value_heads };
    (module == Module::OutProj).then_some(heads)
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
    let expected = module.shape(plan, layer);
    if let Some(found) = m.magnitude.as_ref().map(Vec::len).filter(|found| *found != m.outputs) {
        return Err(wrong(format!("{found} magnitudes"), format!("{}, one for each output", m.outputs)));
    }
    if expected != Some((m.inputs, m.outputs)) {
        let (inputs, outputs) = expected.unwrap_or_default();
        let found = format!("a module of {} inputs and {} outputs", m.inputs, m.outputs);
        return Err(wrong(found, format!("{inputs} and {outputs}, as the model has; it is another model's adapter")));
    }
    Ok((layer, module))
}
