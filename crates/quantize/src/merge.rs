//! Merging an adapter into the model that it was trained on: `W + scale * B A`, with DoRA at the stored length of each row, and
//! whole tensors in the place of the model's own. Computed in f32 whatever the model's type.

use std::ops::Range;
use std::path::Path;

use qwenkit_formats::{Adapter, AdapterModule, ModelFiles, TensorInfo};

use crate::{
    Error,
    metadata::unsayable,
    tensors::{Spec, Tensors},
};

/// Where checkpoints keep the text model; a trainer may have had it elsewhere than the file has it.
const BODIES: [&str; 3] = ["model.language_model.", "language_model.model.", "model."];

/// A model's tensors with an adapter in them.
pub(crate) struct Merged<'a> {
    base: Box<dyn Tensors + 'a>,
    edits: Vec<Edit<'a>>,
}

enum Edit<'a> {
    None,
    Lora(&'a AdapterModule),
    Whole(&'a [f32]),
}

impl<'a> Merged<'a> {
    /// `base` and `adapter` spell names alike. `tied` says that the model's head is its embedding.
    ///
    /// # Errors
    /// When something in the adapter has no place in the model, or its sizes are another model's.
    pub(crate) fn new(
        base: Box<dyn Tensors + 'a>,
        adapter: &'a Adapter,
        origin: &Path,
        tied: bool,
    ) -> Result<Merged<'a>, Error> {
        let mut edits: Vec<Edit<'a>> = base.specs().iter().map(|_| Edit::None).collect();
        let mut place = |name: &str, shape: &[usize], edit: Edit<'a>| {
            let is_end = ["lm_head.weight", "output.weight", "embed_tokens.weight", "token_embd.weight"];
            if tied && is_end.iter().any(|end| name.ends_with(end)) {
                let expected = "no change of embedding or head: they are one tensor in this model, and a change of one would \
                                change the other";
                return Err(unsayable(origin, &format!("`{name}`"), "adapted", expected));
            }
            let index = find(&*base, name).ok_or_else(|| {
                let expected = format!(
                    "a tensor of {}\nhint: is it the model that the adapter was trained on?",
                    base.path().display()
                );
                unsayable(origin, &format!("`{name}`"), "a name that the model lacks", &expected)
            })?;
            let spec = &base.specs()[index];
            if spec.shape != shape {
                let expected = format!(
                    "{:?}, as in {}\nhint: is it the model that the adapter was trained on?",
                    spec.shape,
                    base.path().display()
                );
                return Err(unsayable(origin, &format!("`{name}`"), format!("{shape:?}"), &expected));
            }
            if !matches!(edits[index], Edit::None) {
                return Err(unsayable(origin, &format!("`{name}`"), "there twice", "one change of each tensor"));
            }
            edits[index] = edit;
            Ok(())
        };
        for module in &adapter.modules {
            place(&format!("{}.weight", module.name), &[module.outputs, module.inputs], Edit::Lora(module))?;
        }
        for tensor in &adapter.whole {
            place(&tensor.name, &tensor.shape, Edit::Whole(&tensor.values))?;
        }
        Ok(Merged { base, edits })
    }
}

/// The tensor of this name, or of the same name in another body.
fn find(base: &dyn Tensors, name: &str) -> Option<usize> {
    let has = |name: &str| base.specs().iter().position(|spec| spec.name == name);
    has(name).or_else(|| {
        let rest = BODIES.iter().find_map(|body| name.strip_prefix(body))?;
        BODIES.iter().find_map(|body| has(&format!("{body}{rest}")))
    })
}

impl Tensors for Merged<'_> {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn specs(&self) -> &[Spec] {
        self.base.specs()
    }

    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        match &self.edits[index] {
            Edit::None => self.base.values(index, range, out),
            Edit::Whole(values) => {
                out.extend_from_slice(&values[range]);
                Ok(())
            }
            Edit::Lora(module) => {
                // Whole rows around the range.
                let cols = module.inputs;
                let rows = range.start / cols..range.end.div_ceil(cols);
                let start = out.len();
                self.base.values(index, rows.start * cols..rows.end * cols, out)?;
                for (row, values) in rows.clone().zip(out[start..].chunks_exact_mut(cols)) {
                    add(module, row, values);
                }
                let before = range.start - rows.start * cols;
                if before > 0 {
                    out.drain(start..start + before);
                }
                out.truncate(start + range.len());
                Ok(())
            }
        }
    }

    fn stored(&self, index: usize) -> Option<(&ModelFiles, &TensorInfo)> {
        match self.edits[index] {
            Edit::None => self.base.stored(index),
            _ => None,
        }
    }
}

/// What the module does to row `row` of W: (in).
fn add(module: &AdapterModule, row: usize, values: &mut [f32]) {
    let b = &module.b[row * module.rank..][..module.rank];
    for (b, a) in b.iter().zip(module.a.chunks_exact(module.inputs)) {
        let factor = module.scale * b;
        values.iter_mut().zip(a).for_each(|(x, a)| *x += factor * a);
    }
    if let Some(magnitude) = &module.magnitude {
        let length = values.iter().map(|x| f64::from(*x) * f64::from(*x)).sum::<f64>().sqrt();
        let factor = if length > 0.0 { (f64::from(magnitude[row]) / length) as f32 } else { 0.0 };
        values.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn module(magnitude: Option<Vec<f32>>) -> AdapterModule {
        AdapterModule {
            name: "m".into(),
            inputs: 2,
            outputs: 2,
            rank: 1,
            scale: 2.0,
            a: vec![1.0, -1.0],
            b: vec![0.5, 3.0],
            magnitude,
        }
    }

    #[test]
    fn a_row_gets_its_product_and_its_length() {
        let mut row = [3.0, 5.0];
        add(&module(None), 0, &mut row);
        assert_eq!(row, [4.0, 4.0]);
        let mut row = [-3.0, 10.0];
        add(&module(Some(vec![1.0, 10.0])), 1, &mut row);
        // (3, 4) has the length 5.
        assert_eq!(row, [6.0, 8.0]);
    }
}
