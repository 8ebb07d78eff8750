//! Stop texts: an answer ends where one of them begins, also when it comes in pieces.

/// Watches a stream of text for the first stop text; holds back what may be the beginning of one.
pub(crate) struct StopText {
    stops: Vec<String>,
    held: String,
}

/// What a piece of text led to.
pub(crate) struct Passed {
    /// Text that can be shown.
    pub(crate) text: String,
    /// The stop text that has come; what follows it is dropped.
    pub(crate) stop: Option<String>,
}

impl StopText {
    pub(crate) fn new(stops: Vec<String>) -> StopText {
        StopText { stops: stops.into_iter().filter(|s| !s.is_empty()).collect(), held: String::new() }
    }

    pub(crate) fn push(&mut self, text: &str) -> Passed {
        self.held.push_str(text);
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop.as_str())?, stop)));
        if let Some((at, stop)) = found.min_by_key(|(at, _)| *at) {
            self.held.truncate(at);
            return Passed { text: std::mem::take(&mut self.held), stop: Some(stop.clone()) };
        }
        // The longest end of the text that a stop text begins with stays back.
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        Passed { text: std::mem::replace(&mut self.held, rest), stop: None }
    }

    /// What was held back, once nothing more comes.
    pub(crate) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that are the beginning of `stop`.
fn overlap(text: &str, stop: &str) -> usize {
    let ends = text.char_indices().map(|(at, _)| text.len() - at);
    ends.filter(|&n| n < stop.len() && stop.as_bytes().starts_with(&text.as_bytes()[text.len() - n..]))
        .max()
        .unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The text shown, for the text cut into pieces of each length.
    fn shown(text: &str, stops: &[&str]) -> (String, bool) {
        let mut results = Vec::new();
        for size in 1..=text.len() {
            let mut watch = StopText::new(stops.iter().map(|s| (*s).to_owned()).collect());
            let (mut out, mut stopped) = (String::new(), false);
            let chars: Vec<char> = text.chars().collect();
            for piece in chars.chunks(size) {
                let passed = watch.push(&piece.iter().collect::<String>());
                out.push_str(&passed.text);
                if passed.stop.is_some() {
                    stopped = true;
                    break;
                }
            }
            if !stopped {
                out.push_str(&watch.finish());
            }
            results.push((out, stopped));
        }
        results.dedup();
        assert_eq!(results.len(), 1, "the cut changed the answer: {results:?}");
        results.remove(0)
    }

    #[test]
    fn ends_at_the_first_whole_stop() {
        assert_eq!(shown("one two three", &["two", "three"]), ("one ".into(), true));
        assert_eq!(shown("aabaabaac", &["aac"]), ("aabaab".into(), true));
        assert_eq!(shown("नमस्ते दुनिया", &["दु"]), ("नमस्ते ".into(), true));
    }

    #[test]
    fn a_beginning_alone_is_text() {
        assert_eq!(shown("### Us", &["### User"]), ("### Us".into(), false));
        assert_eq!(shown("plain", &[]), ("plain".into(), false));
        assert_eq!(shown("plain", &[""]), ("plain".into(), false));
    }
}
