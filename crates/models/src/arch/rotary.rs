//! Reads rotary positions from config.json and from GGUF metadata. Whether they fit the heads is checked in `hyper`.

use qwenkit_formats::{Config, Gguf};

use super::hyper::wrong;
use crate::{
    error::Error,
    plan::{RopePlan, RopeSections, Yarn},
};

/// Of a GGUF file; `key` puts the architecture before a name. `interleaved`: how this architecture's sections lie, which the
/// file does not say.
pub(super) fn of_gguf(
    gguf: &Gguf,
    key: &impl Fn(&str) -> String,
    head_dim: usize,
    context: usize,
    interleaved: bool,
) -> Result<RopePlan, Error> {
    let meta = gguf.metadata();
    let name = key("rope.dimension_sections");
    // A fourth section, always 0, is llama.cpp's.
    let sections = match meta.i32s(&name)? {
        None => None,
        Some(found) => {
            let pairs: Option<Vec<usize>> = found.iter().map(|&n| usize::try_from(n).ok()).collect();
            let pairs = pairs.filter(|pairs| pairs.len() == 3 || pairs.len() == 4 && pairs[3] == 0);
            let Some(&[time, height, width]) = pairs.as_deref().and_then(|pairs| pairs.first_chunk()) else {
                return Err(wrong(gguf.path(), &name, format!("{found:?}"), "pairs of time, height and width"));
            };
            Some(RopeSections { pairs: [time, height, width], interleaved })
        }
    };
    Ok(RopePlan {
        dims: meta.usize(&key("rope.dimension_count"))?.unwrap_or(head_dim),
        theta: f64::from(meta.f32(&key("rope.freq_base"))?.unwrap_or(10_000.0)),
        yarn: gguf_yarn(gguf, key, context)?,
        sections,
    })
}

fn gguf_yarn(gguf: &Gguf, key: &impl Fn(&str) -> String, context: usize) -> Result<Option<Yarn>, Error> {
    let meta = gguf.metadata();
    let name = key("rope.scaling.type");
    let factor = match meta.string(&name)? {
        None | Some("none") => return Ok(None),
        Some("yarn") => f64::from(meta.require_f32(&key("rope.scaling.factor"))?),
        Some(other) => return Err(wrong(gguf.path(), &name, format!("`{other}`"), "`none` or `yarn`")),
    };
    let number = |name: &str| meta.f32(&key(name)).map(|x| x.map(f64::from));
    Ok(Some(Yarn {
        factor,
        original_tokens: meta.usize(&key("rope.scaling.original_context_length"))?.unwrap_or(context),
        beta_fast: number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
        beta_slow: number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
        attention_factor: number("rope.scaling.yarn_attn_factor")?,
    }))
}

/// Both spellings: `rope_parameters` of transformers 5, or `rope_theta` with `rope_scaling` before it.
///
/// # Errors
/// When the scaling is of a kind that is not computed here, or a number is none.
pub(super) fn of_config(
    config: &Config,
    head_dim: usize,
    context: usize,
    rotated_share: f64,
) -> Result<RopePlan, Error> {
    let parameters = match config.object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => config.object("rope_scaling")?,
    };
    let (mut theta, mut partial, mut yarn) = (config.f64("rope_theta")?, config.f64("partial_rotary_factor")?, None);
    let mut sections = None;
    if let Some(p) = parameters {
        theta = p.f64("rope_theta")?.or(theta);
        partial = p.f64("partial_rotary_factor")?.or(partial);
        sections = config_sections(&p)?;
        let kind = match p.string("rope_type")? {
            Some(kind) => Some(kind),
            None => p.string("type")?,
        };
        yarn = match kind {
            None | Some("default" | "mrope") => None,
            Some("yarn") if p.bool("truncate")? == Some(false) => {
                return Err(wrong(config.path(), "truncate", false, "true: pairs of YaRN's ramp are whole here"));
            }
            Some("yarn") => Some(Yarn {
                factor: p.require_f64("factor")?,
                original_tokens: p.usize("original_max_position_embeddings")?.unwrap_or(context),
                beta_fast: p.f64("beta_fast")?.unwrap_or(32.0),
                beta_slow: p.f64("beta_slow")?.unwrap_or(1.0),
                attention_factor: yarn_attention(&p)?,
            }),
            Some(other) => {
                return Err(wrong(config.path(), "rope_type", format!("`{other}`"), "`default` or `yarn`"));
            }
        };
    }
    let dims = (head_dim as f64 * partial.unwrap_or(rotated_share)) as usize;
    Ok(RopePlan { dims, theta: theta.unwrap_or(10_000.0), yarn, sections })
}

/// What YaRN multiplies queries' and keys' rotations with, where the file says it: by itself, or as the quotient of two scales.
fn yarn_attention(p: &Config) -> Result<Option<f64>, Error> {
    let (stated, factor) = (p.f64("attention_factor")?, p.require_f64("factor")?);
    let scale = |m: f64| if factor > 1.0 { 0.1 * m * factor.ln() + 1.0 } else { 1.0 };
    Ok(match (stated, p.f64("mscale")?, p.f64("mscale_all_dim")?) {
        (Some(stated), ..) => Some(stated),
        // transformers takes 0 for absent.
        (None, Some(own), Some(all)) if own != 0.0 && all != 0.0 => Some(scale(own) / scale(all)),
        _ => None,
    })
}

/// `mrope_section` with `mrope_interleaved`.
fn config_sections(parameters: &Config) -> Result<Option<RopeSections>, Error> {
    let Some(found) = parameters.usizes("mrope_section")? else { return Ok(None) };
    let &[time, height, width] = found.as_slice() else {
        let found = format!("{} numbers", found.len());
        return Err(wrong(parameters.path(), "mrope_section", found, "pairs of time, height and width"));
    };
    let interleaved = parameters.bool("mrope_interleaved")?.unwrap_or(false);
    Ok(Some(RopeSections { pairs: [time, height, width], interleaved }))
}
