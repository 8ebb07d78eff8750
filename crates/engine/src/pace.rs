//! How many prompt tokens a step may take while others wait for their next token.

use std::time::Duration;

/// Rows of a batch. Prompts are cut to it: large enough that weights are read once for many tokens.
pub(crate) const BATCH_TOKENS: usize = 256;

/// How long a step should take at most while somebody waits for their next token.
const STEP: Duration = Duration::from_millis(200);

/// Fewer prompt tokens than this hardly use the machine, however slow it is.
const LEAST_TOKENS: usize = 32;

/// The speed of the machine with the model at hand, as far as it is known.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    /// Of steps with prompts in them.
    rows_per_second: Option<f64>,
}

impl Pace {
    /// Takes in how long a step of so many rows took.
    pub(crate) fn observe(&mut self, rows: usize, time: Duration) {
        if rows < LEAST_TOKENS || time.is_zero() {
            return;
        }
        let found = rows as f64 / time.as_secs_f64();
        self.rows_per_second = Some(self.rows_per_second.map_or(found, |known| 0.7 * known + 0.3 * found));
    }

    /// Rows for prompts in a step that also generates tokens for `generating` sequences.
    pub(crate) fn prompt_rows(&self, generating: usize) -> usize {
        let most = BATCH_TOKENS.saturating_sub(generating);
        match self.rows_per_second {
            Some(speed) if generating > 0 => {
                let rows = (speed * STEP.as_secs_f64()) as usize;
                rows.saturating_sub(generating).max(LEAST_TOKENS).min(most)
            }
            // The first prompt after the start shows the speed, at half a batch if others wait.
            None if generating > 0 => most.min(BATCH_TOKENS / 2),
            _ => most,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_machine_takes_small_pieces_while_others_wait() {
        let mut pace = Pace::default();
        assert_eq!(pace.prompt_rows(0), BATCH_TOKENS);
        assert_eq!(pace.prompt_rows(1), BATCH_TOKENS / 2);
        pace.observe(512, Duration::from_secs(1));
        assert_eq!(pace.prompt_rows(0), BATCH_TOKENS, "nobody waits");
        assert_eq!(pace.prompt_rows(2), 100);
        for _ in 0..40 {
            pace.observe(512, Duration::from_secs(60));
        }
        assert_eq!(pace.prompt_rows(2), LEAST_TOKENS);
        for _ in 0..40 {
            pace.observe(512, Duration::from_millis(1));
        }
        assert_eq!(pace.prompt_rows(2), BATCH_TOKENS - 2);
        assert_eq!(pace.prompt_rows(BATCH_TOKENS), 0);
    }
}
