//! The numbers of linear attention layers, read from config.json and from GGUF metadata and checked.

use qwenkit_formats::{Config, Gguf};
use qwenkit_kernels::{CONV_WIDTH_MAX, DeltaGate, DeltaShape, HeadOrder};

use super::hyper::{HEADS_MAX, Hyper, wrong};
use crate::{error::Error, plan::DeltaNetPlan};

/// Qwen's heads are 128 values; beyond this a file is broken or hostile.
const LINEAR_HEAD_DIM_MAX: usize = 1 << 12;

/// What a file says of its linear attention; names are those of config.json. All of it may be absent.
#[derive(Debug, Default)]
pub(super) struct LinearNumbers {
    linear_num_key_heads: Option<usize>,
    linear_num_value_heads: Option<usize>,
    linear_key_head_dim: Option<usize>,
    linear_value_head_dim: Option<usize>,
    linear_conv_kernel_dim: Option<usize>,
    output_gate_type: Option<DeltaGate>,
}

impl LinearNumbers {
    pub(super) fn of_gguf(
        gguf: &Gguf,
        key: &impl Fn(&str) -> String,
        is_indexed: bool,
    ) -> Result<LinearNumbers, Error> {
        let number = |name: &str| gguf.metadata().usize(&key(name));
        let value_heads = number("ssm.time_step_rank")?;
        // GGUF has the width of all value heads together; one that the heads do not divide is refused as a size of 0.
        let value_dim = match (number("ssm.inner_size")?, value_heads) {
            (Some(inner), Some(heads)) if heads > 0 && inner.is_multiple_of(heads) => Some(inner / heads),
            (Some(_), Some(_)) => Some(0),
            _ => None,
        };
        // Where the file does not say the architecture does.
        let name = key("ssm.output_gate");
        let output_gate_type = match gguf.metadata().string(&name)? {
            None => is_indexed.then_some(DeltaGate::Sigmoid),
            Some("silu") => Some(DeltaGate::Silu),
            Some("sigmoid") if is_indexed => Some(DeltaGate::Sigmoid),
            Some(other) => return Err(wrong(gguf.path(), &name, format!("`{other}`"), "`silu` or `sigmoid`")),
        };
        Ok(LinearNumbers {
            linear_num_key_heads: number("ssm.group_count")?,
            linear_num_value_heads: value_heads,
            linear_key_head_dim: number("ssm.state_size")?,
            linear_value_head_dim: value_dim,
            linear_conv_kernel_dim: number("ssm.conv_kernel")?,
            output_gate_type,
        })
    }

    pub(super) fn of_config(config: &Config, is_indexed: bool) -> Result<LinearNumbers, Error> {
        // `swish` is another name of silu.
        let output_gate_type = match config.string("output_gate_type")? {
            None => None,
            Some("swish" | "silu") => Some(DeltaGate::Silu),
            Some("sigmoid") if is_indexed => Some(DeltaGate::Sigmoid),
            Some(other) => {
                let expected = if is_indexed { "`swish` or `sigmoid`" } else { "`swish`" };
                return Err(wrong(config.path(), "output_gate_type", format!("`{other}`"), expected));
            }
        };
        Ok(LinearNumbers {
            linear_num_key_heads: config.usize("linear_num_key_heads")?,
            linear_num_value_heads: config.usize("linear_num_value_heads")?,
            linear_key_head_dim: config.usize("linear_key_head_dim")?,
            linear_value_head_dim: config.usize("linear_value_head_dim")?,
            linear_conv_kernel_dim: config.usize("linear_conv_kernel_dim")?,
            output_gate_type,
        })
    }
}

impl Hyper {
    /// The plan of a linear attention layer whose value heads stand in `order`.
    pub(super) fn delta_net(&self, order: HeadOrder) -> Result<DeltaNetPlan, Error> {
        let numbers = &self.linear;
        let dim = |key, found| self.required(key, found, LINEAR_HEAD_DIM_MAX);
        let shape = DeltaShape {
            key_heads: self.required("linear_num_key_heads", numbers.linear_num_key_heads, HEADS_MAX)?,
            value_heads: self.required("linear_num_value_heads", numbers.linear_num_value_heads, HEADS_MAX)?,
            key_dim: dim("linear_key_head_dim", numbers.linear_key_head_dim)?,
            value_dim: dim("linear_value_head_dim", numbers.linear_value_head_dim)?,
            order,
        };
        if !shape.value_heads.is_multiple_of(shape.key_heads) {
            let expected = format!("a multiple of the {} key heads", shape.key_heads);
            return Err(self.wrong("linear_num_value_heads", shape.value_heads, &expected));
        }
        let conv_width = self.required("linear_conv_kernel_dim", numbers.linear_conv_kernel_dim, CONV_WIDTH_MAX)?;
        Ok(DeltaNetPlan { shape, conv_width, gate: numbers.output_gate_type.unwrap_or(DeltaGate::Silu) })
    }
}
