//! The nearest thing that would have been right, for refusals of tensors: another name, another number in the configuration.

use crate::plan::{Ffn, Mixer, Plan};

/// Bytes that two names have in common at their beginnings and their ends.
fn likeness(a: &str, b: &str) -> usize {
    let start = a.bytes().zip(b.bytes()).take_while(|(a, b)| a == b).count();
    let end = a.bytes().rev().zip(b.bytes().rev()).take_while(|(a, b)| a == b).count();
    (start + end).min(a.len()).min(b.len())
}

/// The one of `names` that is most like `name`, of several the first in their order; `None` where none shares two thirds of it.
pub(crate) fn nearest_name<'a>(name: &str, names: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut best: Option<(usize, &str)> = None;
    for other in names {
        let common = likeness(name, other);
        if best.is_none_or(|(most, _)| common > most) {
            best = Some((common, other));
        }
    }
    best.filter(|(common, _)| 3 * common >= 2 * name.len()).map(|(_, other)| other)
}

/// What would make a tensor's shape the right one, as the end of a sentence: empty where nothing single would.
pub(crate) fn nearest_shape(plan: Option<&Plan>, expected: &[usize], found: &[usize]) -> String {
    if expected.len() > 1 && found.iter().rev().eq(expected) {
        return "; the nearest is its transpose, which has that shape".to_owned();
    }
    let axes: Vec<usize> = (0..expected.len().min(found.len())).filter(|&i| expected[i] != found[i]).collect();
    let ([axis], true) = (axes.as_slice(), expected.len() == found.len()) else { return String::new() };
    let (wanted, there) = (expected[*axis], found[*axis]);
    let keys: Vec<String> = plan.into_iter().flat_map(numbers).filter(|(_, n)| *n == wanted).map(|(k, _)| k).collect();
    match keys.as_slice() {
        [] => format!("; the nearest that fits has {there} in place of {wanted} on axis {axis}"),
        keys => {
            let keys = keys.iter().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(" or ");
            format!("; the nearest that fits is a configuration with {there} in place of {wanted}, which is its {keys}")
        }
    }
}

/// Numbers of a configuration that axes of tensors have, by the names that config.json gives them.
fn numbers(plan: &Plan) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    let mut add = |key: &str, number: usize| {
        let known = (key.to_owned(), number);
        if !found.contains(&known) {
            found.push(known);
        }
    };
    add("vocab_size", plan.vocab);
    add("hidden_size", plan.width);
    for layer in &plan.layers {
        if let Mixer::Attention(plan) = &layer.mixer {
            add("head_dim", plan.head_dim);
            let gated = if plan.output_gate { 2 } else { 1 };
            add("num_attention_heads * head_dim", plan.heads * plan.head_dim * gated);
            add("num_key_value_heads * head_dim", plan.kv_heads * plan.head_dim);
        }
        match &layer.ffn {
            Ffn::Dense { width } => add("intermediate_size", *width),
            Ffn::Moe(plan) => {
                add("num_experts", plan.router.experts);
                add("moe_intermediate_size", plan.width);
                if let Some(width) = plan.shared_width {
                    add("shared_expert_intermediate_size", width);
                }
            }
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_nearest_name_shares_most_and_the_first_of_equals_is_taken() {
        let names = ["blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.1.attn_q.weight", "output.weight"];
        assert_eq!(nearest_name("blk.0.attn_q.scale.weight", names.into_iter()), Some("blk.0.attn_q.weight"));
        assert_eq!(nearest_name("blk.0.attn_x.weight", names.into_iter()), Some("blk.0.attn_q.weight"));
        assert_eq!(nearest_name("rope_freqs", names.into_iter()), None);
        assert_eq!(nearest_name("x", [].into_iter()), None);
    }

    #[test]
    fn what_would_make_a_shape_right_is_said() {
        assert_eq!(nearest_shape(None, &[4, 3], &[3, 4]), "; the nearest is its transpose, which has that shape");
        assert_eq!(nearest_shape(None, &[4, 3], &[5, 3]), "; the nearest that fits has 5 in place of 4 on axis 0");
        assert_eq!(nearest_shape(None, &[4, 3], &[5, 6]), "");
        assert_eq!(nearest_shape(None, &[4], &[4, 1, 1]), "");
        assert_eq!(nearest_shape(None, &[], &[4]), "");
    }
}
