//! Mixtures of experts: which experts a token goes to, and how their results come together.
//!
//! Tokens are grouped by expert, so that an expert's matrices are read once for all its tokens. A token's results are
//! added in ascending order of expert, so they have the same bits whoever else is in the batch. The experts' products
//! are ordinary matrix products and not here. Source: Shazeer et al. 2017; order of operations as in transformers 5.

use crate::{
    Isa,
    gates::add_scaled_row,
    lanes::{self, for_each_isa},
    matmul::Compute,
    shared_out::SharedOut,
};

/// One token's visit to one expert.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Route {
    /// The expert, from 0.
    pub expert: usize,
    /// Row of the batch.
    pub token: usize,
    /// What the expert's result is multiplied with.
    pub weight: f32,
}

/// The routes of a batch. Buffers are kept for the next.
#[derive(Default)]
pub struct Routing {
    /// Sorted by expert, then by token.
    routes: Vec<Route>,
    probabilities: Vec<f32>,
    best: Vec<(f32, usize)>,
}

/// How routers choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RouterRule {
    /// E
    pub experts: usize,
    /// How many of them each token goes to.
    pub experts_per_token: usize,
    /// Whether the weights of the chosen are divided by their sum.
    pub norm_topk: bool,
}

impl Routing {
    /// Chooses by the softmax over all experts of `logits`: (T, E). Of equal probabilities the lower expert wins.
    ///
    /// # Panics
    /// If `logits` is not of whole rows, or more experts are wanted than there are.
    pub fn choose(&mut self, isa: Isa, rule: RouterRule, logits: &[f32]) {
        let RouterRule { experts, experts_per_token, norm_topk } = rule;
        assert!(experts > 0 && logits.len().is_multiple_of(experts), "router logits of {experts} experts");
        assert!(experts_per_token <= experts, "{experts_per_token} of {experts} experts");
        self.routes.clear();
        for (token, logits) in logits.chunks_exact(experts).enumerate() {
            self.probabilities.clear();
            self.probabilities.extend_from_slice(logits);
            softmax_row(isa, &mut self.probabilities);
            best(&self.probabilities, experts_per_token, &mut self.best);
            let sum = if norm_topk { self.best.iter().map(|(p, _)| p).sum() } else { 1.0 };
            self.routes.extend(self.best.iter().map(|&(p, expert)| Route { expert, token, weight: p / sum }));
        }
        // No two routes are equal in both, so there is one order.
        self.routes.sort_unstable_by_key(|r| (r.expert, r.token));
    }

    /// The routes of each expert that any token goes to, in ascending order of expert.
    pub fn by_expert(&self) -> impl Iterator<Item = &[Route]> {
        self.routes.chunk_by(|a, b| a.expert == b.expert)
    }
}

impl Compute {
    /// `out`: (routes, D) = the rows of x: (T, D) that the routes name.
    ///
    /// # Panics
    /// If `out` has not one row for each route, or a token is not in `x`.
    pub fn gather_rows(&self, routes: &[Route], x: &[f32], width: usize, out: &mut [f32]) {
        assert_eq!(out.len(), routes.len() * width, "gather_rows");
        self.each_row(out, width, |_, i, out| out.copy_from_slice(&x[routes[i].token * width..][..width]));
    }

    /// Adds each row of y: (routes, D), times its route's weight, to its token's row of `out`: (T, D).
    ///
    /// # Panics
    /// If the shapes do not fit, or the tokens are not in ascending order.
    pub fn add_weighted_rows(&self, routes: &[Route], y: &[f32], width: usize, out: &mut [f32]) {
        assert_eq!(y.len(), routes.len() * width, "add_weighted_rows");
        assert!(routes.is_sorted_by(|a, b| a.token < b.token), "a token's rows are added one after the other");
        let out = SharedOut::new(out);
        let work = |range: std::ops::Range<usize>| {
            for i in range {
                let Route { token, weight, .. } = routes[i];
                // SAFETY: tokens differ, as was just checked, and each route is in exactly one range.
                let row = unsafe { out.slice(token * width, width) };
                add_scaled_row(self.isa, weight, &y[i * width..][..width], row);
            }
        };
        if routes.len() < 4 { work(0..routes.len()) } else { self.pool.run_split(routes.len(), 1, work) }
    }
}

for_each_isa! {
    pub(crate) fn softmax_row(x: &mut [f32]) {
        let largest = x.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        x.iter_mut().for_each(|x| *x = lanes::exp(*x - largest));
        let sum = lanes::sum_by(x, |x| x);
        x.iter_mut().for_each(|x| *x /= sum);
    }
}

/// The `count` largest of `x` with their places, descending; of equals the first.
fn best(x: &[f32], count: usize, best: &mut Vec<(f32, usize)>) {
    best.clear();
    for (i, &x) in x.iter().enumerate() {
        if best.len() == count {
            match best.last() {
                Some(&(least, _)) if x > least => best.pop(),
                _ => continue,
            };
        }
        // Behind all that are at least as large, which came earlier.
        let at = best.partition_point(|&(other, _)| other >= x);
        best.insert(at, (x, i));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn routes(rule: RouterRule, logits: &[f32]) -> Vec<Route> {
        let mut routing = Routing::default();
        routing.choose(Isa::Portable, rule, logits);
        routing.routes
    }

    const RULE: RouterRule = RouterRule { experts: 4, experts_per_token: 2, norm_topk: true };

    #[test]
    fn the_largest_are_chosen_and_sorted_by_expert() {
        let found = routes(RULE, &[0.0, 3.0, 1.0, 2.0, 5.0, 0.0, 0.0, 4.0]);
        let places: Vec<_> = found.iter().map(|r| (r.expert, r.token)).collect();
        assert_eq!(places, [(0, 1), (1, 0), (3, 0), (3, 1)]);
        let one = 1.0 / (1.0 + (-1.0f32).exp());
        assert!((found[1].weight - one).abs() < 1e-6 && (found[2].weight - (1.0 - one)).abs() < 1e-6);
    }

    #[test]
    fn ties_go_to_the_lower_expert() {
        let found = routes(RULE, &[1.0, 2.0, 2.0, 2.0]);
        assert_eq!(found.iter().map(|r| r.expert).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(found[0].weight, 0.5);
        let found = routes(RULE, &[7.0; 4]);
        assert_eq!(found.iter().map(|r| r.expert).collect::<Vec<_>>(), [0, 1]);
    }

    #[test]
    fn every_instruction_set_gives_the_shares_of_the_formula() {
        for isa in Isa::available() {
            for experts in [1, 7, 16, 37, 128] {
                let mut x: Vec<f32> = (0..experts).map(|i| (i as f32 * 1.7).sin() * 8.0).collect();
                let exponents: Vec<f64> = x.iter().map(|x| f64::from(*x).exp()).collect();
                softmax_row(isa, &mut x);
                for (i, (x, e)) in x.iter().zip(&exponents).enumerate() {
                    let exact = e / exponents.iter().sum::<f64>();
                    assert!((f64::from(*x) - exact).abs() < 1e-6, "{isa}, expert {i} of {experts}");
                }
            }
        }
    }

    #[test]
    fn without_renormalisation_weights_are_shares_of_all() {
        let found = routes(RouterRule { norm_topk: false, ..RULE }, &[0.0; 4]);
        assert_eq!(found.iter().map(|r| r.weight).collect::<Vec<_>>(), [0.25, 0.25]);
    }

    #[test]
    fn what_is_no_number_is_no_panic() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            assert_eq!(routes(RULE, &[bad; 4]).len(), 2);
            assert_eq!(routes(RULE, &[bad, 0.0, bad, 1.0]).len(), 2);
        }
    }

    #[test]
    fn rows_come_together_by_weight() {
        let compute = Compute::new(2, Isa::Portable);
        let routes: Vec<_> =
            [1, 3, 4, 6, 7].map(|token| Route { expert: 0, token, weight: token as f32 }).into_iter().collect();
        let x: Vec<f32> = (0..16).map(|i| i as f32).collect();
        let mut gathered = vec![0.0; 10];
        compute.gather_rows(&routes, &x, 2, &mut gathered);
        assert_eq!(gathered, [2.0, 3.0, 6.0, 7.0, 8.0, 9.0, 12.0, 13.0, 14.0, 15.0]);
        let mut out = vec![1.0; 16];
        compute.add_weighted_rows(&routes, &gathered, 2, &mut out);
        assert_eq!(out[2..4], [3.0, 4.0]);
        assert_eq!(out[14..], [99.0, 106.0]);
        assert_eq!(out[..2], [1.0, 1.0]);
    }
}
