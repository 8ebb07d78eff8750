//! What a model's name says of it: `Qwen3-30B-A3B-Instruct-2507` is a `Qwen3`, made to `Instruct`, version `2507`. Readers of GGUF
//! files sort models by these; the words count as in llama.cpp's converter, so that files of both are sorted alike.

/// The parts of a name that files state.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct NameParts {
    pub(crate) basename: Option<String>,
    pub(crate) finetune: Option<String>,
    pub(crate) version: Option<String>,
}

/// What a word is, by its form.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Version,
    /// How numbers are stored, or how many there are: said elsewhere.
    Size,
    Finetune,
    /// Part of the basename in front, of the finetune behind it.
    Free,
}

impl NameParts {
    /// Takes `name` apart. A name of which nothing but the basename is known gives nothing: it may be anything.
    pub(crate) fn of(name: &str) -> NameParts {
        let words: Vec<&str> = name.split('-').filter(|word| !word.is_empty()).collect();
        if name.contains(' ') {
            return NameParts::default();
        }
        let kinds: Vec<Kind> = words.iter().enumerate().map(|(i, word)| kind(word, i == 0)).collect();
        let is_base = |(word, kind): (&&str, &Kind)| match kind {
            Kind::Free => word.starts_with(|c: char| c.is_alphabetic()),
            Kind::Version => true,
            Kind::Size | Kind::Finetune => false,
        };
        let front = words.iter().zip(&kinds).take_while(|&pair| is_base(pair)).count();
        // A version at the end of the basename is the version.
        let base = kinds[..front].iter().rposition(|kind| *kind != Kind::Version).map_or(0, |last| last + 1);
        let joined = |wanted: &dyn Fn(usize) -> bool| {
            let own: Vec<&str> = (0..words.len()).filter(|&i| wanted(i)).map(|i| words[i]).collect();
            (!own.is_empty()).then(|| own.join("-"))
        };
        let finetune = joined(&|i| i >= front && matches!(kinds[i], Kind::Finetune | Kind::Free));
        let version = joined(&|i| i >= base && kinds[i] == Kind::Version);
        if finetune.is_none() && version.is_none() && !kinds.contains(&Kind::Size) {
            return NameParts::default();
        }
        NameParts { basename: joined(&|i| i < base), finetune, version }
    }
}

fn kind(word: &str, is_first: bool) -> Kind {
    let lower = word.to_ascii_lowercase();
    let number = lower.strip_prefix("iter").or_else(|| lower.strip_prefix('v')).unwrap_or(&lower);
    let is_number = |text: &str, dots: &[char]| {
        text.split(dots).all(|part| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit()))
    };
    if is_number(number, &['.']) {
        return Kind::Version;
    }
    let quant = lower.strip_prefix('i').unwrap_or(&lower).strip_prefix('q');
    if quant.is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        || ["fp16", "fp32", "f16", "f32", "bf16"].contains(&lower.as_str())
    {
        return Kind::Size;
    }
    if is_first {
        return Kind::Free;
    }
    // 7B, 0.5B, A3B, 8x7B
    let count = lower.strip_prefix('a').unwrap_or(&lower);
    let count = count.split_once('x').filter(|(times, _)| is_number(times, &[])).map_or(count, |(_, rest)| rest);
    let count = count.strip_suffix(['k', 'm', 'b', 't']);
    if count.is_some_and(|count| is_number(count, &['.', '_']))
        || ["small", "mini", "medium", "large", "xl", "xxl"].contains(&lower.as_str())
    {
        return Kind::Size;
    }
    match lower.as_str() {
        "chat" | "instruct" | "vision" | "lora" => Kind::Finetune,
        _ => Kind::Free,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_come_apart() {
        for (name, basename, finetune, version) in [
            ("Qwen2.5-Coder-0.5B-Instruct", "Qwen2.5-Coder", "Instruct", ""),
            ("Qwen3-30B-A3B-Instruct-2507", "Qwen3", "Instruct", "2507"),
            ("Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL", "Instruct", ""),
            ("Qwen1.5-MoE-A2.7B-Chat", "Qwen1.5-MoE", "Chat", ""),
            ("Qwen3-Embedding-0.6B", "Qwen3-Embedding", "", ""),
            ("Qwen3-4B-Thinking-2507-Q4_K_M", "Qwen3", "Thinking", "2507"),
            ("qwen3.5-vision", "qwen3.5", "vision", ""),
            ("Mixture-8x7B-v0.1", "Mixture", "", "v0.1"),
            ("qwen2-moe", "", "", ""),
            ("my model of 2025", "", "", ""),
            ("--", "", "", ""),
            ("", "", "", ""),
        ] {
            let some = |text: &str| (!text.is_empty()).then(|| text.to_owned());
            let expected = NameParts { basename: some(basename), finetune: some(finetune), version: some(version) };
            assert_eq!(NameParts::of(name), expected, "{name}");
        }
    }
}
