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
    /// Places in `routes` of each token's, (T, experts of a token).
    of_token: Vec<usize>,
    filled: Vec<usize>,
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
        self.places(logits.len() / experts);
    }

    /// Every token's routes, those of an expert one after the other, in ascending order of expert and then of token.
    pub fn routes(&self) -> &[Route] {
        &self.routes
    }

    /// The routes of each expert that any token goes to, in ascending order of expert.
    pub fn by_expert(&self) -> impl Iterator<Item = &[Route]> {
        self.routes.chunk_by(|a, b| a.expert == b.expert)
    }

    /// Fills `of_token` with the places of each token's routes: (T, experts of a token), in ascending order of expert.
    fn places(&mut self, tokens: usize) {
        let each = self.routes.len().checked_div(tokens).unwrap_or(0);
        self.of_token.clear();
        self.of_token.resize(self.routes.len(), 0);
        self.filled.clear();
        self.filled.resize(tokens, 0);
        for (place, route) in self.routes.iter().enumerate() {
            self.of_token[route.token * each + self.filled[route.token]] = place;
            self.filled[route.token] += 1;
        }
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

    /// `out`: (T, D) = for each token the sum of its routes' rows of y: (routes, D), each times the route's weight, in
    /// ascending order of expert.
    ///
    /// # Panics
    /// If the shapes do not fit.
    pub fn add_routes(&self, routing: &Routing, y: &[f32], width: usize, out: &mut [f32]) {
        let (routes, tokens) = (&routing.routes, routing.filled.len());
        assert!(y.len() == routes.len() * width && out.len() == tokens * width, "routes of {tokens} tokens");
        let each = routes.len().checked_div(tokens).unwrap_or(0);
        self.each_row(out, width, |isa, token, out| {
            out.fill(0.0);
            for place in &routing.of_token[token * each..][..each] {
                add_scaled_row(isa, routes[*place].weight, &y[place * width..][..width], out);
            }
        });
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
        // Five tokens, each to two of four experts.
        let logits: Vec<f32> = (0..20).map(|i| ((i * 7 % 11) as f32).sin() * 3.0).collect();
        let mut routing = Routing::default();
        routing.choose(Isa::Portable, RULE, &logits);
        let x: Vec<f32> = (0..10).map(|i| i as f32).collect();
        let mut gathered = vec![0.0; 20];
        compute.gather_rows(routing.routes(), &x, 2, &mut gathered);
        for (route, row) in routing.routes().iter().zip(gathered.chunks_exact(2)) {
            assert_eq!(row, &x[route.token * 2..][..2]);
        }
        // Each expert adds its number, so that a sum says who took part.
        for (route, row) in routing.routes().iter().zip(gathered.chunks_exact_mut(2)) {
            row.fill((route.expert + 1) as f32);
        }
        let mut out = vec![f32::NAN; 10];
        compute.add_routes(&routing, &gathered, 2, &mut out);
        for (token, out) in out.chunks_exact(2).enumerate() {
            let own = routing.routes().iter().filter(|r| r.token == token);
            let expected: f32 = own.fold(0.0, |sum, r| sum + r.weight * (r.expert + 1) as f32);
            assert_eq!(out, [expected; 2], "token {token}");
        }
    }
}
