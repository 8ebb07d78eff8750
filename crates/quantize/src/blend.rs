//! Blending models of one shape into one: weighted means, the way along a circle, and differences from a common base, thinned
//! at random (DARE) or by size with a vote on signs (TIES). Sources: Yu et al. 2023 (DARE), Yadav et al. 2023 (TIES),
//! Shoemake 1985 (slerp).

use std::collections::HashMap;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use qwenkit_formats::{ModelFiles, TensorInfo};

use crate::{
    Error,
    metadata::unsayable,
    tensors::{Spec, Tensors},
};

/// How models become one.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Method {
    /// The weighted mean of all, the base included with what the others' weights leave of 1.
    Linear,
    /// From the base to the one other along the circle between them; its weight says how far.
    Slerp,
    /// The base, and the weighted sum of the others' differences from it.
    Task,
    /// As `Task`; of each difference a random share is kept, and made larger in turn.
    Dare {
        /// The share.
        density: f32,
        /// Which random numbers.
        seed: u64,
    },
    /// As `Task`; of each difference the largest share is kept, and where signs differ only those of the stronger side count.
    Ties {
        /// The share.
        density: f32,
    },
}

/// Tensors of several models, blended.
pub(crate) struct Blended<'a> {
    base: Box<dyn Tensors + 'a>,
    others: Vec<Other<'a>>,
    method: Method,
    /// What has to be known of a whole tensor before its first value.
    facts: Vec<Mutex<Option<Arc<Facts>>>>,
}

struct Other<'a> {
    tensors: Box<dyn Tensors + 'a>,
    /// Number of each of the base's tensors there.
    index: Vec<usize>,
    weight: f32,
}

#[derive(Clone, Debug, Default)]
struct Facts {
    /// Of slerp: the factors of base and other.
    factors: (f32, f32),
    /// Of TIES: for each other the least difference that is kept.
    least: Vec<f32>,
}

/// Values that are read at once where a whole tensor is looked at.
const PIECE_VALUES: usize = 1 << 20;

impl<'a> Blended<'a> {
    /// Blends `others`, each with its weight, into `base`.
    ///
    /// # Errors
    /// When shapes differ, or the method does not fit the number of models or the weights.
    pub(crate) fn new(
        base: Box<dyn Tensors + 'a>,
        others: Vec<(Box<dyn Tensors + 'a>, f32)>,
        method: Method,
    ) -> Result<Blended<'a>, Error> {
        if others.is_empty() || method == Method::Slerp && others.len() != 1 {
            let expected = if method == Method::Slerp { "one" } else { "one at least" };
            return Err(unsayable(base.path(), "the number of models to blend in", others.len(), expected));
        }
        let density = match method {
            Method::Dare { density, .. } | Method::Ties { density } => density,
            _ => 1.0,
        };
        // Written so that NaN fails it.
        if !(density > 0.0 && density <= 1.0) {
            return Err(unsayable(base.path(), "the density", density, "above 0 and up to 1"));
        }
        let find = |(tensors, weight): (Box<dyn Tensors + 'a>, f32)| {
            let names: HashMap<String, usize> = tensors.specs().iter().map(|spec| spec.name.clone()).zip(0..).collect();
            let find = |spec: &Spec| {
                let at = names.get(&spec.name).copied();
                let shape = at.map(|at| tensors.specs()[at].shape.clone());
                at.filter(|_| shape.as_ref() == Some(&spec.shape)).ok_or_else(|| {
                    let found = shape.map_or("missing".into(), |shape| format!("{shape:?}"));
                    let expected = format!("{:?}, as in {}", spec.shape, base.path().display());
                    unsayable(tensors.path(), &format!("tensor `{}`", spec.name), found, &expected)
                })
            };
            let index = base.specs().iter().map(find).collect::<Result<Vec<_>, _>>()?;
            if tensors.specs().len() != base.specs().len() {
                let found = format!("{} tensors", tensors.specs().len());
                let expected = format!("{}, as in {}", base.specs().len(), base.path().display());
                return Err(unsayable(tensors.path(), "the model", found, &expected));
            }
            Ok(Other { tensors, index, weight })
        };
        let others = others.into_iter().map(find).collect::<Result<Vec<_>, _>>()?;
        let facts = base.specs().iter().map(|_| Mutex::default()).collect();
        Ok(Blended { base, others, method, facts })
    }

    /// What a tensor's pieces share; the first that asks computes it while the others wait, as it may take the whole tensor.
    fn facts(&self, index: usize) -> Result<Arc<Facts>, Error> {
        let mut held = self.facts[index].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(facts) = &*held {
            return Ok(facts.clone());
        }
        let values = self.base.specs()[index].values();
        let facts = match self.method {
            Method::Slerp => Facts { factors: self.circle(index, values)?, ..Facts::default() },
            Method::Ties { density } => {
                let least = |other: &Other<'_>| {
                    let mut sizes = Vec::with_capacity(values);
                    let mut read = |range: Range<usize>| {
                        let (mut a, mut b) = (Vec::new(), Vec::new());
                        self.base.values(index, range.clone(), &mut a)?;
                        other.tensors.values(other.index[index], range, &mut b)?;
                        sizes.extend(a.iter().zip(&b).map(|(a, b)| (b - a).abs()));
                        Ok::<_, Error>(())
                    };
                    (0..values)
                        .step_by(PIECE_VALUES)
                        .try_for_each(|start| read(start..(start + PIECE_VALUES).min(values)))?;
                    let dropped = values - ((values as f64 * f64::from(density)).round() as usize).clamp(1, values);
                    let (_, least, _) = sizes.select_nth_unstable_by(dropped, f32::total_cmp);
                    Ok::<_, Error>(*least)
                };
                Facts { least: self.others.iter().map(least).collect::<Result<_, _>>()?, ..Facts::default() }
            }
            _ => Facts::default(),
        };
        Ok(held.insert(Arc::new(facts)).clone())
    }

    /// Factors that lead a share of the way along the circle through both tensors.
    fn circle(&self, index: usize, values: usize) -> Result<(f32, f32), Error> {
        let other = &self.others[0];
        let t = f64::from(other.weight);
        let (mut aa, mut bb, mut ab) = (0.0_f64, 0.0_f64, 0.0_f64);
        for start in (0..values).step_by(PIECE_VALUES) {
            let range = start..(start + PIECE_VALUES).min(values);
            let (mut a, mut b) = (Vec::new(), Vec::new());
            self.base.values(index, range.clone(), &mut a)?;
            other.tensors.values(other.index[index], range, &mut b)?;
            for (a, b) in a.iter().zip(&b) {
                let (a, b) = (f64::from(*a), f64::from(*b));
                (aa, bb, ab) = (aa + a * a, bb + b * b, ab + a * b);
            }
        }
        let cos = (ab / (aa * bb).sqrt()).clamp(-1.0, 1.0);
        let angle = cos.acos();
        // Nearly the same or opposite directions have no circle between them.
        if angle.is_nan() || angle.sin() < 1e-4 {
            return Ok(((1.0 - t) as f32, t as f32));
        }
        let of = |share: f64| ((share * angle).sin() / angle.sin()) as f32;
        Ok((of(1.0 - t), of(t)))
    }
}

impl Tensors for Blended<'_> {
    fn path(&self) -> &Path {
        self.base.path()
    }

    fn specs(&self) -> &[Spec] {
        self.base.specs()
    }

    fn values(&self, index: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
        let facts = self.facts(index)?;
        let start = out.len();
        self.base.values(index, range.clone(), out)?;
        let base = &mut out[start..];
        let mut others = Vec::with_capacity(self.others.len());
        for other in &self.others {
            let mut values = Vec::with_capacity(range.len());
            other.tensors.values(other.index[index], range.clone(), &mut values)?;
            others.push(values);
        }
        let weights: Vec<f32> = self.others.iter().map(|other| other.weight).collect();
        match self.method {
            Method::Linear => {
                let own = 1.0 - weights.iter().sum::<f32>();
                base.iter_mut().for_each(|x| *x *= own);
                for (values, weight) in others.iter().zip(&weights) {
                    base.iter_mut().zip(values).for_each(|(x, y)| *x += weight * y);
                }
            }
            Method::Slerp => {
                let (own, other) = facts.factors;
                base.iter_mut().zip(&others[0]).for_each(|(x, y)| *x = own * *x + other * y);
            }
            Method::Task => {
                let first = base.to_vec();
                for (values, weight) in others.iter().zip(&weights) {
                    base.iter_mut().zip(values).zip(&first).for_each(|((x, y), a)| *x += weight * (y - a));
                }
            }
            Method::Dare { density, seed } => {
                let first = base.to_vec();
                let name = &self.base.specs()[index].name;
                let own = name.bytes().fold(seed, |hash, byte| mixed(hash ^ u64::from(byte)));
                for (n, (values, weight)) in others.iter().zip(&weights).enumerate() {
                    let stream = mixed(own ^ n as u64);
                    for (i, ((x, y), a)) in base.iter_mut().zip(values).zip(&first).enumerate() {
                        // 24 bits of a number that depends on the value's place alone.
                        let number =
                            (mixed(stream.wrapping_add((range.start + i) as u64)) >> 40) as f32 / (1 << 24) as f32;
                        if number < density {
                            *x += weight * (y - a) / density;
                        }
                    }
                }
            }
            Method::Ties { .. } => {
                for (i, x) in base.iter_mut().enumerate() {
                    let kept = |n: usize| {
                        let difference = others[n][i] - *x;
                        if difference.abs() >= facts.least[n] { difference } else { 0.0 }
                    };
                    let vote: f32 = (0..others.len()).map(|n| weights[n] * kept(n)).sum();
                    let (mut sum, mut total) = (0.0, 0.0);
                    for (n, weight) in weights.iter().enumerate() {
                        let difference = kept(n);
                        if difference != 0.0 && (weight * difference > 0.0) == (vote > 0.0) {
                            sum += weight * difference;
                            total += weight.abs();
                        }
                    }
                    // The mean of those on the stronger side, at the full strength of their weights together.
                    let strength: f32 = weights.iter().map(|w| w.abs()).sum::<f32>().min(1.0);
                    *x += if total > 0.0 { strength * sum / total } else { 0.0 };
                }
            }
        }
        Ok(())
    }

    fn stored(&self, _: usize) -> Option<(&ModelFiles, &TensorInfo)> {
        None
    }
}

/// A number of 64 bits each of which depends on all bits of `x` (splitmix64).
fn mixed(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;
    use qwenkit_tensor::DType;

    #[derive(Clone)]
    struct Values(Vec<f32>, [Spec; 1]);

    impl Values {
        fn new(values: &[f32]) -> Values {
            Values(values.to_vec(), [Spec { name: "w".into(), shape: vec![values.len()], dtype: DType::F32 }])
        }
    }

    impl Tensors for Values {
        fn path(&self) -> &Path {
            Path::new("model")
        }
        fn specs(&self) -> &[Spec] {
            &self.1
        }
        fn values(&self, _: usize, range: Range<usize>, out: &mut Vec<f32>) -> Result<(), Error> {
            out.extend_from_slice(&self.0[range]);
            Ok(())
        }
        fn stored(&self, _: usize) -> Option<(&ModelFiles, &TensorInfo)> {
            None
        }
    }

    fn blend(base: &[f32], others: &[(&[f32], f32)], method: Method) -> Vec<f32> {
        let boxed = |values: &[f32]| -> Box<dyn Tensors> { Box::new(Values::new(values)) };
        let len = base.len();
        let others = others.iter().map(|(values, w)| (boxed(values), *w)).collect();
        let blended = Blended::new(boxed(base), others, method).unwrap();
        let mut out = Vec::new();
        // In two pieces, which must not matter.
        blended.values(0, 0..len / 2, &mut out).unwrap();
        blended.values(0, len / 2..len, &mut out).unwrap();
        out
    }

    #[test]
    fn means_differences_and_circles() {
        let (a, b, c) = ([1.0, 2.0], [3.0, 6.0], [5.0, 0.0]);
        assert_eq!(blend(&a, &[(&b, 0.25), (&c, 0.25)], Method::Linear), [2.5, 2.5]);
        assert_eq!(blend(&a, &[(&b, 0.5), (&c, 1.0)], Method::Task), [6.0, 2.0]);
        let half = blend(&[1.0, 0.0], &[(&[0.0, 1.0], 0.5)], Method::Slerp);
        assert!(half.iter().all(|x| (x - 0.5_f32.sqrt()).abs() < 1e-6), "{half:?}");
    }

    #[test]
    fn the_smaller_differences_and_the_weaker_sign_are_left_out() {
        let base = [0.0; 4];
        // Of each the two largest are kept: (4, -3) and (-1, 5); where both are, the vote decides.
        let (b, c) = ([4.0, -3.0, 1.0, 0.5], [-1.0, 0.1, 5.0, 0.2]);
        assert_eq!(blend(&base, &[(&b, 0.5), (&c, 0.5)], Method::Ties { density: 0.5 }), [4.0, -3.0, 5.0, 0.0]);
    }

    #[test]
    fn a_random_share_is_kept_and_the_sum_stays() {
        let (base, other) = (vec![0.0; 10_000], vec![1.0; 10_000]);
        let method = Method::Dare { density: 0.25, seed: 7 };
        let out = blend(&base, &[(&other, 1.0)], method);
        assert!(out.iter().all(|x| *x == 0.0 || *x == 4.0));
        let mean = out.iter().sum::<f32>() / 10_000.0;
        assert!((mean - 1.0).abs() < 0.1, "{mean}");
        assert_eq!(out, blend(&base, &[(&other, 1.0)], method));
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let (a, b) = (Values::new(&[1.0]), Values::new(&[1.0, 2.0]));
        let boxed = |values: &Values| -> Box<dyn Tensors> { Box::new(values.clone()) };
        assert!(Blended::new(boxed(&a), vec![(boxed(&b), 1.0)], Method::Linear).is_err());
        assert!(Blended::new(boxed(&a), vec![], Method::Task).is_err());
        assert!(Blended::new(boxed(&a), vec![(boxed(&a), 1.0)], Method::Ties { density: 0.0 }).is_err());
    }
}
