//! A checkpoint's configuration as GGUF metadata: the keys that llama.cpp's converter writes, and a few more where Qwen
//! models differ in what it has no key for.
//!
//! Own keys: `expert_weights_norm` where a model divides by the sum of its experts' weights and its kind usually does not, or the
//! other way round; `attention.sliding_window` with `attention.sliding_window_pattern`, true for layers with a window;
//! `ssm.output_gate`; `ngram.*`, the numbers of embeddings of runs of tokens.

use std::path::Path;

use qwenkit_formats::gguf::{Array, Metadata};
use qwenkit_formats::{Checkpoint, Config, ModelFiles};
use qwenkit_kernels::DeltaGate;
use qwenkit_models::{
    AttentionPlan, DeltaNetPlan, Ffn, LayerPlan, Mixer, MoePlan, Plan, VisionPlan, arch, vision_plan,
};

use crate::{Error, choice::Kind, model_name::NameParts, size_label::size_label, tensors::Spec, vocabulary};

/// The version of the block formats, which never changed since 2023.
const QUANTIZATION_VERSION: u32 = 2;

/// Everything that a GGUF file says beside its tensors.
pub(crate) fn of_checkpoint(
    (files, checkpoint): (&ModelFiles, &Checkpoint),
    plan: &Plan,
    specs: &[Spec],
    kind: Kind,
    out: &Path,
) -> Result<Metadata, Error> {
    let Some(architecture) = arch::gguf_name(plan.architecture) else {
        return Err(unsayable(
            checkpoint.path(),
            "the architecture",
            plan.architecture,
            "one that GGUF has a name for",
        ));
    };
    let mut meta = Metadata::new(out);
    general(&mut meta, checkpoint.path(), architecture, "model", specs);
    let whole = checkpoint.config();
    let text = whole.object("text_config")?;
    let mut keys = Keys { meta: &mut meta, architecture, plan, path: checkpoint.path() };
    keys.sizes(text.as_ref().unwrap_or(whole))?;
    keys.rope()?;
    keys.experts()?;
    keys.windows()?;
    keys.delta_net();
    keys.streams();
    keys.ngrams(text.as_ref().unwrap_or(whole), whole)?;
    if plan.sight.is_some() && plan.architecture.starts_with("qwen3_vl") {
        let stacked = tower_plan(files, plan)?.map_or(0, |tower| tower.deepstack.len());
        meta.set(&format!("{architecture}.n_deepstack_layers"), stacked as u32);
    }
    meta.set("general.file_type", kind.file_type());
    meta.set("general.quantization_version", QUANTIZATION_VERSION);
    if let Some(config) = checkpoint.generation_config() {
        sampling(&mut meta, config)?;
    }
    vocabulary::add(&mut meta, checkpoint, plan.vocab)?;
    Ok(meta)
}

/// The plan of the tower in a checkpoint, if there is one.
pub(crate) fn tower_plan(files: &ModelFiles, plan: &Plan) -> Result<Option<VisionPlan>, Error> {
    let ModelFiles::Checkpoint(checkpoint) = files else { return Ok(None) };
    match plan.sight.is_some() && checkpoint.config().object("vision_config")?.is_some() {
        true => Ok(Some(vision_plan(files, None, plan)?)),
        false => Ok(None),
    }
}

pub(crate) fn unsayable(path: &Path, what: &str, found: impl ToString, expected: &str) -> Error {
    Error::Unsayable {
        path: path.to_owned(),
        what: what.to_owned(),
        found: found.to_string(),
        expected: expected.to_owned(),
    }
}

/// `general.*` but for the file's type.
pub(crate) fn general(meta: &mut Metadata, path: &Path, architecture: &str, kind: &str, specs: &[Spec]) {
    meta.set("general.architecture", architecture);
    meta.set("general.type", kind);
    if let Some(name) = path.canonicalize().ok().as_deref().and_then(Path::file_name) {
        let name = name.to_string_lossy();
        meta.set("general.name", title(&name));
        let NameParts { basename, finetune, version } = NameParts::of(&name);
        for (key, value) in [("basename", basename), ("finetune", finetune), ("version", version)] {
            if let Some(value) = value {
                meta.set(&format!("general.{key}"), value);
            }
        }
    }
    meta.set("general.size_label", size_label(specs));
}

/// `qwen2.5-vl` as `Qwen2.5 Vl`: words with a large letter in front.
fn title(name: &str) -> String {
    let word = |word: &str| {
        let mut chars = word.chars();
        chars.next().map(|first| first.to_uppercase().chain(chars).collect::<String>()).unwrap_or_default()
    };
    name.split(['-', '_', ' ']).filter(|w| !w.is_empty()).map(word).collect::<Vec<_>>().join(" ")
}

/// What the makers recommend.
fn sampling(meta: &mut Metadata, config: &Config) -> Result<(), Error> {
    for (key, own) in
        [("temperature", "temp"), ("top_p", "top_p"), ("min_p", "min_p"), ("repetition_penalty", "penalty_repeat")]
    {
        if let Some(value) = config.f32(key)? {
            meta.set(&format!("general.sampling.{own}"), value);
        }
    }
    if let Some(k) = config.usize("top_k")? {
        meta.set("general.sampling.top_k", k as i32);
    }
    Ok(())
}

struct Keys<'a> {
    meta: &'a mut Metadata,
    architecture: &'static str,
    plan: &'a Plan,
    path: &'a Path,
}

impl Keys<'_> {
    fn set(&mut self, name: &str, value: impl Into<qwenkit_formats::gguf::Value>) {
        self.meta.set(&format!("{}.{name}", self.architecture), value);
    }

    fn number(&mut self, name: &str, value: usize) {
        self.set(name, value as u32);
    }

    fn attention(&self) -> Option<&AttentionPlan> {
        self.plan.layers.iter().find_map(|layer| match &layer.mixer {
            Mixer::Attention(attention) => Some(attention),
            Mixer::DeltaNet(_) => None,
        })
    }

    fn linear(&self) -> Option<DeltaNetPlan> {
        self.plan.layers.iter().find_map(|layer| match &layer.mixer {
            Mixer::DeltaNet(delta) => Some(*delta),
            Mixer::Attention(_) => None,
        })
    }

    fn mixture(&self) -> Option<MoePlan> {
        self.plan.layers.iter().find_map(|layer| match layer.ffn {
            Ffn::Moe(moe) => Some(moe),
            Ffn::Dense { .. } => None,
        })
    }

    fn sizes(&mut self, config: &Config) -> Result<(), Error> {
        let plan = self.plan;
        let guessing = usize::from(plan.mtp_in_gguf().is_some());
        self.number("block_count", plan.layers.len() + guessing);
        if guessing > 0 {
            self.number("nextn_predict_layers", guessing);
        }
        self.number("context_length", plan.context_tokens);
        self.number("embedding_length", plan.width);
        let dense = plan.layers.iter().find_map(|l| if let Ffn::Dense { width } = l.ffn { Some(width) } else { None });
        if let Some(width) = dense.or(config.usize("intermediate_size")?) {
            self.number("feed_forward_length", width);
        }
        // A model without any attention layer still has these numbers in its config.
        let (heads, kv_heads, head_dim) = match self.attention() {
            Some(a) => (a.heads, a.kv_heads, Some(a.head_dim)),
            None => {
                let heads = config.require_usize("num_attention_heads")?;
                (heads, config.usize("num_key_value_heads")?.unwrap_or(heads), config.usize("head_dim")?)
            }
        };
        self.number("attention.head_count", heads);
        self.number("attention.head_count_kv", kv_heads);
        // Where it is not what everybody takes it for.
        let usual = plan.width / heads.max(1);
        if let Some(dim) = head_dim.filter(|dim| *dim != usual || config.get("head_dim").is_some()) {
            self.number("attention.key_length", dim);
            self.number("attention.value_length", dim);
        }
        self.set("attention.layer_norm_rms_epsilon", plan.rms_norm_eps);
        Ok(())
    }

    fn rope(&mut self) -> Result<(), Error> {
        let rope = self.plan.rope.clone();
        if let Some(sections) = rope.sections {
            let [time, height, width] = sections.pairs.map(|n| n as i32);
            self.set("rope.dimension_sections", Array::I32(vec![time, height, width, 0]));
        }
        self.set("rope.freq_base", rope.theta as f32);
        if self.linear().is_some() {
            self.number("rope.dimension_count", rope.dims);
        }
        let Some(yarn) = rope.yarn else { return Ok(()) };
        if let Some(found) = yarn.attention_factor {
            let usual = 0.1 * yarn.factor.ln() + 1.0;
            if (found - usual).abs() > 1e-6 {
                let expected = format!("{usual}, as programs differ in what another in a GGUF file means");
                return Err(unsayable(self.path, "the attention_factor of YaRN", found, &expected));
            }
        }
        self.set("rope.scaling.type", "yarn");
        self.set("rope.scaling.factor", yarn.factor as f32);
        self.number("rope.scaling.original_context_length", yarn.original_tokens);
        for (name, value, usual) in [
            ("rope.scaling.yarn_beta_fast", yarn.beta_fast, 32.0),
            ("rope.scaling.yarn_beta_slow", yarn.beta_slow, 1.0),
        ] {
            if value != usual {
                self.set(name, value as f32);
            }
        }
        Ok(())
    }

    fn experts(&mut self) -> Result<(), Error> {
        let Some(MoePlan { router, width, shared_width }) = self.mixture() else { return Ok(()) };
        self.number("expert_count", router.experts);
        self.number("expert_used_count", router.experts_per_token);
        self.number("expert_feed_forward_length", width);
        if let Some(shared) = shared_width {
            self.number("expert_shared_feed_forward_length", shared);
        }
        if router.norm_topk != (self.plan.architecture != "qwen2_moe") {
            self.set("expert_weights_norm", router.norm_topk);
        }
        Ok(())
    }

    fn windows(&mut self) -> Result<(), Error> {
        let windows: Vec<Option<usize>> = self
            .plan
            .layers
            .iter()
            .map(|layer| if let Mixer::Attention(a) = &layer.mixer { a.window } else { None })
            .collect();
        let Some(width) = windows.iter().flatten().next().copied() else { return Ok(()) };
        if self.linear().is_some() || windows.iter().flatten().any(|other| *other != width) {
            let expected = "windows of one width in a model without linear attention";
            return Err(unsayable(self.path, "sliding_window", format!("{windows:?}"), expected));
        }
        self.number("attention.sliding_window", width);
        self.set("attention.sliding_window_pattern", Array::Bool(windows.iter().map(Option::is_some).collect()));
        Ok(())
    }

    fn delta_net(&mut self) {
        let Some(delta) = self.linear() else { return };
        self.number("ssm.conv_kernel", delta.conv_width);
        self.number("ssm.state_size", delta.shape.key_dim);
        self.number("ssm.group_count", delta.shape.key_heads);
        self.number("ssm.time_step_rank", delta.shape.value_heads);
        self.number("ssm.inner_size", delta.shape.value_width());
        let mut is_linear: Vec<bool> =
            self.plan.layers.iter().map(|layer| matches!(layer.mixer, Mixer::DeltaNet(_))).collect();
        // Where every so many layers one is not, the interval says the same.
        if let Some(first) = is_linear.iter().position(|linear| !linear)
            && is_linear.iter().enumerate().all(|(i, linear)| *linear != (i + 1).is_multiple_of(first + 1))
        {
            self.number("full_attention_interval", first + 1);
        }
        // An entry for each of `block_count`: the block that guesses is none of them.
        is_linear.extend(self.plan.mtp_in_gguf().map(|_| false));
        self.set("attention.recurrent_layers", Array::Bool(is_linear));
        if self.plan.architecture == "qwen4_exp" {
            self.set("ssm.output_gate", if delta.gate == DeltaGate::Silu { "silu" } else { "sigmoid" });
        }
    }

    fn streams(&mut self) {
        if let Some(streams) = self.plan.streams {
            self.number("hyper_connection.count", streams.count);
            self.number("hyper_connection.low_rank", streams.rank);
        }
        let Some(indexer) = self.attention().and_then(|a| a.indexer) else { return };
        self.number("attention.indexer.head_count", indexer.heads);
        self.number("attention.indexer.key_length", indexer.head_dim);
        self.number("attention.indexer.top_k", indexer.blocks * indexer.block_tokens);
        let ratio = |layer: &LayerPlan| match &layer.mixer {
            Mixer::Attention(_) => indexer.block_tokens as u32,
            Mixer::DeltaNet(_) => 0,
        };
        let ratios = self.plan.layers.iter().map(ratio).collect();
        self.set("attention.compress_ratios", Array::U32(ratios));
    }

    fn ngrams(&mut self, config: &Config, whole: &Config) -> Result<(), Error> {
        let with = |(i, layer): (usize, &LayerPlan)| layer.ngrams.clone().map(|ngrams| (i, ngrams));
        let layers: Vec<_> = self.plan.layers.iter().enumerate().filter_map(with).collect();
        let Some((_, first)) = layers.first() else { return Ok(()) };
        self.set("ngram.layers", Array::U32(layers.iter().map(|(i, _)| *i as u32).collect()));
        self.number("ngram.longest", first.longest);
        self.number("ngram.tables", first.tables_each);
        self.number("ngram.embedding_length", first.sizes.len() * first.row_dim);
        self.number("ngram.conv_kernel", first.conv.width);
        self.number("ngram.end_token_id", first.end as usize);
        // Where config.json does not say, the reader takes the same numbers for a GGUF file.
        for (key, name) in [
            ("ngram_vocab_size_base", "ngram.table_rows"),
            ("make_ngram_vocab_size_divisible_by", "ngram.rows_divisor"),
            ("seed", "ngram.seed"),
        ] {
            let found = match config.usize(key)? {
                Some(found) => Some(found),
                None => whole.usize(key)?,
            };
            if let Some(found) = found {
                self.set(name, found as u64);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_folders_become_titles() {
        assert_eq!(title("qwen2.5-vl"), "Qwen2.5 Vl");
        assert_eq!(title("Qwen3-0.6B"), "Qwen3 0.6B");
    }
}
