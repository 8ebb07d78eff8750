//! The best few of a list by quickselect, in one fixed way.
//!
//! Where scores are equal at the border, which of them are chosen follows from the way alone. Scores of an index are often
//! equal - what is not positive counts as 0 - and the record of what is right was made with the way of GNU's C++ library,
//! which PyTorch's `topk` takes on a processor; so this is that way: the median of three goes to the front, a partition
//! around it that stops at equals, insertion at the end.

/// A score and its place.
pub(crate) type Scored = (f32, usize);

/// Moves the `count` best of `x` to its front, in no order. What is no number is better than any.
pub(crate) fn best_to_front(x: &mut [Scored], count: usize) {
    let (mut first, mut last) = (0, x.len());
    if count == 0 || count >= last {
        return;
    }
    let mut rounds = 2 * last.ilog2();
    while last - first > 3 {
        if rounds == 0 {
            // An order that defeats the pivots; it has no equals at stake.
            x[first..last].sort_by(|a, b| b.0.total_cmp(&a.0));
            return;
        }
        rounds -= 1;
        let cut = first + partition(&mut x[first..last]);
        if cut < count {
            first = cut;
        } else {
            last = cut;
        }
    }
    for i in first + 1..last {
        let mut at = i;
        while at > first && is_better(x[at], x[at - 1]) {
            x.swap(at, at - 1);
            at -= 1;
        }
    }
}

fn is_better(a: Scored, b: Scored) -> bool {
    a.0 > b.0 || a.0.is_nan() && !b.0.is_nan()
}

/// Cuts more than three elements in two around one of them: none behind the cut is better than any before it.
fn partition(x: &mut [Scored]) -> usize {
    let (a, b, c) = (1, x.len() / 2, x.len() - 1);
    let better = |i: usize, j: usize| is_better(x[i], x[j]);
    let median = match (better(a, b), better(b, c), better(a, c)) {
        (true, true, _) | (false, false, false) => b,
        (true, false, true) | (false, true, false) => c,
        (true, false, false) | (false, _, true) => a,
    };
    x.swap(0, median);
    let pivot = x[0];
    let (mut front, mut back) = (1, x.len());
    loop {
        while is_better(x[front], pivot) {
            front += 1;
        }
        back -= 1;
        while is_better(pivot, x[back]) {
            back -= 1;
        }
        if front >= back {
            return front;
        }
        x.swap(front, back);
        front += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(scores: &[f32], count: usize) -> Vec<usize> {
        let mut x: Vec<Scored> = scores.iter().copied().zip(0..).collect();
        best_to_front(&mut x, count);
        let mut places: Vec<usize> = x[..count].iter().map(|(_, place)| *place).collect();
        places.sort_unstable();
        places
    }

    /// Pseudo-random scores, of which many are 0.
    fn scores(len: usize, seed: usize) -> Vec<f32> {
        (0..len).map(|i| ((((i + seed * 131) * 7919 + seed) % 1009) as f32 / 400.0 - 1.0).max(0.0)).collect()
    }

    #[test]
    fn the_best_are_in_front() {
        for (len, seed) in (1..200).flat_map(|len| (0..5).map(move |seed| (len, seed))) {
            let scores = scores(len, seed);
            for count in [0, 1, len / 3, len / 2, len - 1, len] {
                let found = chosen(&scores, count);
                assert!(found.is_sorted_by(|a, b| a < b), "each once");
                let worst = found.iter().map(|i| scores[*i]).fold(f32::INFINITY, f32::min);
                let others = (0..len).filter(|i| !found.contains(i)).map(|i| scores[i]);
                assert!(others.fold(0.0, f32::max) <= worst, "{count} of {len}");
            }
        }
    }

    /// What PyTorch 2.15 chooses: `torch.tensor(scores).topk(4).indices`.
    #[test]
    fn equals_are_chosen_as_the_reference_chooses() {
        let recorded: [(&[f32], [usize; 4]); 7] = [
            (&[1.0, 0.0, 2.0, 0.0, 3.0], [0, 2, 3, 4]),
            (&[2.0, 3.0, 2.0, 2.0, 1.0, 0.0], [0, 1, 2, 3]),
            (&[3.0, 0.0, 3.0, 0.0, 2.0, 0.0, 0.0], [0, 2, 4, 6]),
            (&[0.0, 0.0, 0.0, 3.0, 0.0, 0.0, 1.0, 0.0], [3, 4, 5, 6]),
            (&[1.0, 0.0, 0.0, 2.0, 0.0, 0.0, 0.0, 0.0, 3.0], [0, 3, 6, 8]),
            (&[3.0, 0.0, 0.0, 3.0, 3.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0], [0, 3, 4, 7]),
            (&[0.0, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0], [2, 5, 8, 10]),
        ];
        for (scores, expected) in recorded {
            assert_eq!(chosen(scores, 4), expected, "{scores:?}");
        }
    }

    #[test]
    fn orders_that_defeat_pivots_and_no_numbers_end() {
        let mut down: Vec<f32> = (0..1000).map(|i| if i % 2 == 0 { i as f32 } else { 2000.0 - i as f32 }).collect();
        assert_eq!(chosen(&down, 500).len(), 500);
        down[7] = f32::NAN;
        assert!(chosen(&down, 3).contains(&7));
        assert_eq!(chosen(&[f32::NAN; 9], 4).len(), 4);
    }
}
