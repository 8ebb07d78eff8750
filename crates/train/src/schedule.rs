//! How the learning rate goes over the steps of a run: up from nothing, then along a curve.

/// The curve behind the warm-up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Curve {
    /// The same all the way.
    Constant,
    /// Straight down to nothing.
    Linear,
    /// Down along half a cosine to nothing.
    Cosine,
}

/// A schedule.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    /// The highest rate.
    pub rate: f64,
    /// What follows the warm-up.
    pub curve: Curve,
    /// Steps over which the rate rises.
    pub warmup_steps: usize,
    /// Steps of the run.
    pub steps: usize,
}

impl Curve {
    /// The curve of this name.
    pub fn named(name: &str) -> Option<Curve> {
        [Curve::Constant, Curve::Linear, Curve::Cosine].into_iter().find(|curve| curve.name() == name)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Curve::Constant => "constant",
            Curve::Linear => "linear",
            Curve::Cosine => "cosine",
        }
    }
}

impl Schedule {
    /// The rate of step `step`, counted from 0.
    pub fn at(&self, step: usize) -> f64 {
        if step < self.warmup_steps {
            return self.rate * (step + 1) as f64 / (self.warmup_steps + 1) as f64;
        }
        let rest = self.steps.saturating_sub(self.warmup_steps).max(1);
        let done = (step - self.warmup_steps).min(rest) as f64 / rest as f64;
        self.rate
            * match self.curve {
                Curve::Constant => 1.0,
                Curve::Linear => 1.0 - done,
                Curve::Cosine => 0.5 * (1.0 + (std::f64::consts::PI * done).cos()),
            }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_rise_and_fall() {
        let of = |curve| {
            let schedule = Schedule { rate: 2.0, curve, warmup_steps: 3, steps: 11 };
            (0..11).map(|step| schedule.at(step)).collect::<Vec<_>>()
        };
        for curve in [Curve::Constant, Curve::Linear, Curve::Cosine] {
            let rates = of(curve);
            assert_eq!(rates[..4], [0.5, 1.0, 1.5, 2.0], "{}", curve.name());
            assert_eq!(Curve::named(curve.name()), Some(curve));
        }
        assert_eq!(of(Curve::Constant)[10], 2.0);
        assert_eq!(of(Curve::Linear)[7], 1.0);
        assert!((of(Curve::Cosine)[7] - 1.0).abs() < 1e-12 && of(Curve::Cosine)[10] < 0.1);
        assert_eq!(Schedule { rate: 1.0, curve: Curve::Cosine, warmup_steps: 0, steps: 1 }.at(0), 1.0);
    }
}
