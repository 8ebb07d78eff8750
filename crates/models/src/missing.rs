//! What a file lacks of its plan, for the one who has to do something about it: how many tensors are missing and which are the
//! first, what stands in their place, and whether the file looks like another architecture's.
//!
//! Runs on the way to a refusal, and to see whether a block that guesses is whole. `load` says what is needed; `wanted` here lists the same names, which
//! `tests/refusals.rs` holds against whole files.

use std::{
    collections::HashSet,
    ops::ControlFlow::{self, Break, Continue},
    path::Path,
};

use qwenkit_formats::TensorInfo;

use crate::{
    error::Error,
    names::{self, Naming, Pair},
    near::{nearest_name, nearest_shape},
    plan::{AttentionPlan, Ffn, LayerPlan, Mixer, MoePlan, Plan},
};

/// Beyond so many nobody counts on: the largest Qwen has a third of them, and a hostile config could ask for any number.
const COUNTED_MAX: usize = 100_000;
/// How many are named beside the first.
const NAMED_MAX: usize = 3;

/// Where a tensor is missing.
#[derive(Clone, Copy)]
pub(crate) struct Place<'a> {
    pub(crate) path: &'a Path,
    /// What the file says it is.
    pub(crate) architecture: &'static str,
    /// What it has.
    pub(crate) tensors: &'a [TensorInfo],
    /// The text model that it should be; absent where only its name is known, and for towers.
    pub(crate) plan: Option<(&'a Plan, Naming)>,
}

impl Place<'_> {
    /// The refusal of a file without the tensor `name`.
    pub(crate) fn missing(&self, name: String, shape: Vec<usize>) -> Error {
        let survey = self.survey(&name);
        let more = match survey.count {
            0 => String::new(),
            count => {
                let shown = survey.first.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ");
                let dots = if count > survey.first.len() { ", ..." } else { "" };
                let at_least = if count >= COUNTED_MAX { "at least " } else { "" };
                let others = if count == 1 { "is 1 other".to_owned() } else { format!("are {at_least}{count} others") };
                format!(", and so {others} ({shown}{dots})")
            }
        };
        let beside = format!("{more}; {}", self.nearest(&name, &survey.foreign)).into_boxed_str();
        Error::TensorMissing { path: self.path.to_owned(), name, shape, architecture: self.architecture, beside }
    }

    /// The refusal of a tensor of another shape.
    pub(crate) fn shape(&self, name: String, expected: Vec<usize>, found: Vec<usize>) -> Error {
        let nearest = nearest_shape(self.plan.map(|(plan, _)| plan), &expected, &found).into_boxed_str();
        let (expected, found) = (expected.into_boxed_slice(), found.into_boxed_slice());
        Error::TensorShape { path: self.path.to_owned(), name, expected, found, nearest }
    }

    /// The refusal of a file with `count` tensors that the plan does not name, `first` among them; `is_used` tells which it names.
    pub(crate) fn unused(&self, count: usize, first: String, is_used: impl Fn(&str) -> bool) -> Error {
        let (path, architecture) = (self.path.to_owned(), self.architecture);
        let looks = match self.other_kind(&[first.as_str()]) {
            Some((kind, _)) => format!("; {kind} models have such"),
            None => match nearest_name(&first, self.names().filter(|name| is_used(name))) {
                Some(near) => format!("; the nearest that belongs to it is `{near}`"),
                None => String::new(),
            },
        };
        Error::TensorsUnused { path, count, first, architecture, looks }
    }

    /// What else is missing, and what is there that the plan does not name.
    fn survey(&self, name: &str) -> Survey<'_> {
        let all: HashSet<&str> = self.tensors.iter().map(|t| t.name.as_str()).collect();
        let Some((plan, naming)) = self.plan else {
            return Survey { count: 0, first: Vec::new(), foreign: self.names().collect() };
        };
        let (mut count, mut first, mut left) = (0, Vec::new(), all.clone());
        let _ = wanted(plan, naming, &|name| all.contains(name), &mut |spellings| {
            let mut is_there = false;
            for spelling in &spellings {
                left.remove(spelling.as_str());
                is_there |= all.contains(spelling.as_str()) || spelling == name;
            }
            if !is_there {
                count += 1;
                first.extend(spellings.into_iter().next().filter(|_| count <= NAMED_MAX));
            }
            if count < COUNTED_MAX { Continue(()) } else { Break(()) }
        });
        left.retain(|name| !may_be_there(plan, naming, name));
        Survey { count, first, foreign: self.names().filter(|name| left.contains(name)).collect() }
    }

    fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.iter().map(|t| t.name.as_str())
    }

    /// What stands in place of `name`, as the end of the sentence and a hint.
    fn nearest(&self, name: &str, foreign: &[&str]) -> String {
        let near = nearest_name(name, foreign.iter().copied());
        let incomplete = "hint: the file is not whole; fetch it or write it again";
        let renamed = "hint: take the model in the form in which Qwen published it, or convert it again";
        match (self.other_kind(foreign), near) {
            (Some((kind, telling)), _) => format!(
                "it has `{telling}`, as {kind} models have\n\
                 hint: the weights are not those that the configuration describes; take both from one place"
            ),
            (None, Some(near)) => format!("the nearest that is there is `{near}`\n{renamed}"),
            (None, None) if self.plan.is_some_and(|(_, naming)| name == naming.outer(names::HEAD)) => format!(
                "the nearest is the embedding, which is the head where `tie_word_embeddings` is true\n{incomplete}"
            ),
            (None, None) if foreign.is_empty() => format!("what is there belongs to the model\n{incomplete}"),
            (None, None) => format!("no name that is there is near, the first is `{}`\n{renamed}", foreign[0]),
        }
    }

    /// The kind of model that the file's names speak of, if it is another than the plan's, and which of the tensors that the
    /// plan does not name is told by.
    fn other_kind<'a>(&self, foreign: &[&'a str]) -> Option<(&'static str, &'a str)> {
        let (plan, naming) = self.plan?;
        let has = |pair: &Pair| self.names().any(|name| is_of(naming, name, *pair));
        let kind = Marks::of_names(has).kind().filter(|kind| Some(*kind) != Marks::of_plan(plan).kind())?;
        let telling = foreign.iter().find(|name| MARKS.iter().any(|pair| is_of(naming, name, *pair)))?;
        Some((kind, telling))
    }
}

/// What a file lacks of the block `layer` that guesses the token after the next, in words; none where it is whole.
pub(crate) fn lacking_in_block(
    plan: &Plan,
    naming: Naming,
    layer: &LayerPlan,
    has: &dyn Fn(&str) -> bool,
) -> Option<String> {
    let (mut count, mut first) = (0, Vec::new());
    let _ = wanted_of_block(plan, naming, layer, has, &mut |spellings| {
        if !spellings.iter().any(|name| has(name)) {
            count += 1;
            first.extend(spellings.into_iter().next().filter(|_| count <= NAMED_MAX).map(|name| format!("`{name}`")));
        }
        if count < COUNTED_MAX { Continue(()) } else { Break(()) }
    });
    let more = match count - first.len() {
        0 => String::new(),
        1 => " and 1 other".to_owned(),
        more => format!(" and {more} others"),
    };
    (count > 0).then(|| format!("{}{more}", first.join(", ")))
}

struct Survey<'a> {
    /// Other tensors that are missing.
    count: usize,
    /// The first of them.
    first: Vec<String>,
    /// Tensors that the plan does not name.
    foreign: Vec<&'a str>,
}

/// Whether a name in some layer is that of `pair`.
fn is_of(naming: Naming, name: &str, pair: Pair) -> bool {
    let own = naming.own(pair);
    !own.is_empty() && name.strip_suffix(own).is_some_and(|start| start.ends_with('.'))
}

/// Tensors by which generations are told apart.
const MARKS: [Pair; 8] = [
    names::STREAMS_MIXER.0,
    names::RATE,
    names::ROUTER,
    names::SHARED_ROUTER,
    names::QKV_PROJ,
    names::Q_BIAS,
    names::Q_NORM,
    names::GATE_PROJ,
];

/// What sets generations apart.
struct Marks {
    streams: bool,
    delta: bool,
    router: bool,
    shared: bool,
    fused: bool,
    bias: bool,
    norm: bool,
}

impl Marks {
    fn of_names(has: impl Fn(&Pair) -> bool) -> Marks {
        let [streams, delta, router, shared, fused, bias, norm, _] = MARKS.each_ref().map(has);
        Marks { streams, delta, router, shared, fused, bias, norm }
    }

    fn of_plan(plan: &Plan) -> Marks {
        let layers = || plan.layers.iter();
        let attention = |has: fn(&AttentionPlan) -> bool| {
            layers().any(|layer| matches!(&layer.mixer, Mixer::Attention(plan) if has(plan)))
        };
        let mixture =
            |has: fn(&MoePlan) -> bool| layers().any(|layer| matches!(&layer.ffn, Ffn::Moe(plan) if has(plan)));
        Marks {
            streams: plan.streams.is_some(),
            delta: layers().any(|layer| matches!(layer.mixer, Mixer::DeltaNet(_))),
            router: mixture(|_| true),
            shared: mixture(|plan| plan.shared_width.is_some()),
            fused: attention(|plan| plan.fused_qkv),
            bias: attention(|plan| plan.qkv_bias),
            norm: attention(|plan| plan.qk_norm),
        }
    }

    /// The architectures whose text models have these marks.
    fn kind(&self) -> Option<&'static str> {
        Some(match self {
            Marks { streams: true, .. } => "qwen4_exp",
            Marks { delta: true, router: true, .. } => "qwen3_next and qwen3_5_moe",
            Marks { delta: true, .. } => "qwen3_5",
            Marks { router: true, shared: true, norm: false, .. } => "qwen2_moe",
            Marks { router: true, norm: true, .. } => "qwen3_moe",
            Marks { router: true, .. } => return None,
            Marks { norm: true, .. } => "qwen3",
            Marks { fused: true, .. } => "qwen",
            Marks { bias: true, .. } => "qwen2",
            _ => return None,
        })
    }
}

/// Whether a file may have a tensor that `wanted` does not list.
fn may_be_there(plan: &Plan, naming: Naming, name: &str) -> bool {
    let is_head = name == naming.outer(names::HEAD) || name == names::JUDGE;
    // Tables in parts and constants of hashes.
    let of_ngrams = name.contains(".ple_embedding.");
    is_head || of_ngrams || naming.is_spare(name, plan.spare_blocks(), plan.has_parts_beside)
}

/// Calls `each` with the spellings of every tensor that the plan needs, one of which has to be there, until it breaks off.
fn wanted(
    plan: &Plan,
    naming: Naming,
    has: &dyn Fn(&str) -> bool,
    each: &mut dyn FnMut(Vec<String>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    each(vec![naming.outer(names::EMBEDDING)])?;
    for (i, layer) in plan.layers.iter().enumerate() {
        wanted_of_layer(plan, (naming, i), layer, has, each)?;
    }
    match plan.streams {
        None => each(vec![naming.outer(names::NORM)])?,
        Some(_) => of_streams(names::STREAMS_OUT).into_iter().try_for_each(|pair| each(vec![naming.outer(pair)]))?,
    }
    if !plan.tied && !plan.headless {
        each(vec![naming.outer(names::HEAD)])?;
    }
    match &plan.mtp {
        Some(layer) => wanted_of_block(plan, naming, layer, has, each),
        None => Continue(()),
    }
}

/// The same of the block that guesses the token after the next.
fn wanted_of_block(
    plan: &Plan,
    naming: Naming,
    layer: &LayerPlan,
    has: &dyn Fn(&str) -> bool,
    each: &mut dyn FnMut(Vec<String>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let layers = plan.layers.len();
    names::MTP_OUTER.into_iter().try_for_each(|pair| each(vec![naming.mtp(layers, pair)]))?;
    wanted_of_layer(plan, naming.of_mtp(layers), layer, has, each)
}

fn wanted_of_layer(
    plan: &Plan,
    (naming, i): (Naming, usize),
    layer: &LayerPlan,
    has: &dyn Fn(&str) -> bool,
    each: &mut dyn FnMut(Vec<String>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let mut pairs: Vec<Vec<Pair>> = Vec::new();
    let mut add = |new: &[Pair]| pairs.extend(new.iter().map(|pair| vec![*pair]));
    match plan.streams {
        None => add(&[names::INPUT_NORM]),
        Some(_) => add(&[of_streams(names::STREAMS_MIXER), of_streams(names::STREAMS_FFN)].concat()),
    }
    match &layer.mixer {
        Mixer::Attention(plan) => add(&of_attention(plan)),
        Mixer::DeltaNet(_) => add(&[names::CONV, names::FADE_BIAS, names::RATE, names::DELTA_NORM, names::DELTA_OUT]),
    }
    match &layer.ffn {
        Ffn::Dense { .. } => add(&[names::GATE_PROJ, names::UP_PROJ, names::DOWN_PROJ]),
        Ffn::Moe(plan) => {
            add(&[names::ROUTER]);
            if plan.shared_width.is_some() {
                add(&[names::SHARED_ROUTER, names::SHARED_GATE, names::SHARED_UP, names::SHARED_DOWN]);
            }
        }
    }
    if layer.ngrams.is_some() {
        add(&[names::NGRAM_KEY, names::NGRAM_VALUE, names::NGRAM_CONV]);
        add(&[names::NGRAM_NORM_KEY, names::NGRAM_NORM_QUERY, names::NGRAM_NORM_CONV]);
    }
    if plan.streams.is_none() {
        let (usual, other) = (names::POST_NORM, names::POST_NORM_HYBRID);
        pairs.push(if plan.has_recurrent_state() { vec![other, usual] } else { vec![usual, other] });
    }
    if matches!(layer.mixer, Mixer::DeltaNet(_)) {
        pairs.extend([names::IN_QKV, names::IN_Z].map(|pair| vec![pair, names::IN_QKVZ]));
        pairs.extend([names::IN_B, names::IN_A].map(|pair| vec![pair, names::IN_BA]));
    }
    for spellings in pairs {
        each(spellings.into_iter().map(|pair| naming.inner(i, pair)).collect())?;
    }
    if layer.ngrams.is_some() {
        let parts = naming.ngram_part(i, 0).map(|part| vec![naming.inner(i, names::NGRAM_TABLE), part]);
        each(parts.unwrap_or_else(|| vec![naming.outer(names::NGRAM_TABLE)]))?;
    }
    match &layer.ffn {
        Ffn::Dense { .. } => Continue(()),
        Ffn::Moe(plan) => wanted_of_experts((naming, i), plan, has, each),
    }
}

fn wanted_of_experts(
    (naming, i): (Naming, usize),
    plan: &MoePlan,
    has: &dyn Fn(&str) -> bool,
    each: &mut dyn FnMut(Vec<String>) -> ControlFlow<()>,
) -> ControlFlow<()> {
    let matrices = ["gate_proj", "up_proj", "down_proj"];
    let own = |e, matrix| naming.expert(i, e, matrix);
    if !matrices.iter().any(|matrix| own(0, matrix).is_some_and(|name| has(&name))) {
        // One name for gate and up in checkpoints.
        let mut names =
            [names::EXPERTS_GATE, names::EXPERTS_UP, names::EXPERTS_DOWN].map(|p| naming.inner(i, p)).to_vec();
        names.dedup();
        return names.into_iter().try_for_each(|name| each(vec![name]));
    }
    for e in 0..plan.router.experts {
        matrices.iter().filter_map(|matrix| own(e, matrix)).try_for_each(|name| each(vec![name]))?;
    }
    Continue(())
}

fn of_streams((norm, down, up, inject): (Pair, Pair, Pair, Option<Pair>)) -> Vec<Pair> {
    [norm, down, up].into_iter().chain(inject).collect()
}

fn of_attention(plan: &AttentionPlan) -> Vec<Pair> {
    let mut pairs = match plan.fused_qkv {
        true => vec![names::QKV_PROJ],
        false => vec![names::Q_PROJ, names::K_PROJ, names::V_PROJ],
    };
    match (plan.qkv_bias, plan.fused_qkv) {
        (false, _) => {}
        (true, true) => pairs.push(names::QKV_BIAS),
        (true, false) => pairs.extend([names::Q_BIAS, names::K_BIAS, names::V_BIAS]),
    }
    pairs.push(names::O_PROJ);
    if plan.qk_norm {
        pairs.extend([names::Q_NORM, names::K_NORM]);
    }
    if plan.indexer.is_some() {
        // The first two are one name in checkpoints.
        pairs.extend([names::INDEX_Q, names::INDEX_K, names::INDEX_Q_NORM, names::INDEX_K_NORM]);
    }
    pairs
}
