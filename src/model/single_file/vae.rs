//! The original (CompVis) spelling of a VAE's tensors, in which single-file VAEs are handed around.

/// The diffusers name of an original key, or `None` where the key is not in that spelling. `levels`: how many
/// the VAE has; the original counts the decoder's from the bottom.
pub fn to_diffusers(key: &str, levels: usize) -> Option<String> {
    let key = key.strip_prefix("first_stage_model.").unwrap_or(key);
    let (half, rest) = key.split_once('.')?;
    if matches!(half, "quant_conv" | "post_quant_conv") {
        return Some(key.to_string());
    }
    let parts: Vec<&str> = rest.split('.').collect();
    let renamed = match (half, &parts[..]) {
        ("encoder" | "decoder", ["norm_out", leaf]) => format!("conv_norm_out.{leaf}"),
        ("encoder", ["down", level, "block", block, tail @ ..]) => {
            format!("down_blocks.{level}.resnets.{block}.{}", resnet(tail))
        }
        ("encoder", ["down", level, "downsample", tail @ ..]) => {
            format!("down_blocks.{level}.downsamplers.0.{}", tail.join("."))
        }
        ("decoder", ["up", level, tail @ ..]) => {
            let level = levels.checked_sub(1)?.checked_sub(level.parse().ok()?)?;
            match tail {
                ["block", block, tail @ ..] => {
                    format!("up_blocks.{level}.resnets.{block}.{}", resnet(tail))
                }
                ["upsample", tail @ ..] => {
                    format!("up_blocks.{level}.upsamplers.0.{}", tail.join("."))
                }
                _ => return None,
            }
        }
        (_, ["mid", "block_1", tail @ ..]) => format!("mid_block.resnets.0.{}", resnet(tail)),
        (_, ["mid", "block_2", tail @ ..]) => format!("mid_block.resnets.1.{}", resnet(tail)),
        (_, ["mid", "attn_1", layer, leaf]) => {
            let layer = match *layer {
                "norm" => "group_norm",
                "q" => "to_q",
                "k" => "to_k",
                "v" => "to_v",
                "proj_out" => "to_out.0",
                _ => return None,
            };
            format!("mid_block.attentions.0.{layer}.{leaf}")
        }
        ("encoder" | "decoder", ["conv_in" | "conv_out", _]) => rest.to_string(),
        _ => return None,
    };
    Some(format!("{half}.{renamed}"))
}

fn resnet(tail: &[&str]) -> String {
    tail.join(".").replace("nin_shortcut", "conv_shortcut")
}

#[cfg(test)]
mod tests {
    use super::to_diffusers;

    #[test]
    fn original_names_become_those_of_diffusers() {
        let name = |key| to_diffusers(key, 4);
        for (original, diffusers) in [
            (
                "encoder.down.1.block.0.nin_shortcut.weight",
                "encoder.down_blocks.1.resnets.0.conv_shortcut.weight",
            ),
            (
                "encoder.down.0.downsample.conv.bias",
                "encoder.down_blocks.0.downsamplers.0.conv.bias",
            ),
            (
                "decoder.up.3.block.2.norm1.weight",
                "decoder.up_blocks.0.resnets.2.norm1.weight",
            ),
            (
                "first_stage_model.decoder.up.1.upsample.conv.weight",
                "decoder.up_blocks.2.upsamplers.0.conv.weight",
            ),
            (
                "decoder.mid.attn_1.proj_out.weight",
                "decoder.mid_block.attentions.0.to_out.0.weight",
            ),
            (
                "decoder.mid.block_2.conv1.bias",
                "decoder.mid_block.resnets.1.conv1.bias",
            ),
            ("encoder.norm_out.weight", "encoder.conv_norm_out.weight"),
            ("first_stage_model.quant_conv.weight", "quant_conv.weight"),
            (
                "first_stage_model.encoder.conv_in.weight",
                "encoder.conv_in.weight",
            ),
        ] {
            assert_eq!(name(original).as_deref(), Some(diffusers));
        }
    }

    #[test]
    fn names_of_diffusers_are_left_alone() {
        for key in [
            "encoder.down_blocks.0.resnets.0.norm1.weight",
            "decoder.mid_block.attentions.0.to_q.weight",
        ] {
            assert_eq!(to_diffusers(key, 4), None);
        }
    }
}
