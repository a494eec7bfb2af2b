//! diffusers' AutoencoderTiny in the VAE's place: where it is taken from, what is refused, and that files stay the same.

use serde_json::json;

use super::setup::*;

/// `--vae` of the small one.
fn taesd() -> String {
    format!("--vae {}", data("vae-tiny").display())
}

#[track_caller]
fn pixels(folder: &Path, name: &str) -> image::RgbaImage {
    image(folder.join(name)).to_rgba8()
}

#[test]
fn an_autoencoder_tiny_is_taken_from_a_folder_or_is_the_models_own() {
    let folder = folder_of(&[("in.png", 24, 40)]);
    let own = copy_of_model(folder.path());
    for file in files(&data("vae-tiny")) {
        fs::copy(data("vae-tiny").join(&file), own.join("vae").join(&file)).unwrap();
    }
    run(folder.path(), &format!("in.png -o named.png {}", taesd())).ends_in(0);
    plain(folder.path(), "in.png -o own.png -s 1 --model model").ends_in(0);
    run(folder.path(), "in.png -o kl.png").ends_in(0);
    assert!(pixels(folder.path(), "named.png") == pixels(folder.path(), "own.png"));
    assert!(pixels(folder.path(), "named.png") != pixels(folder.path(), "kl.png"));
}

/// The tensors of the published size: names and shapes, which are diffusers' for its default configuration.
fn published() -> Vec<(String, Vec<usize>)> {
    let mut tensors = Vec::new();
    let mut conv = |name: String, outputs: usize, inputs: usize, bias: bool| {
        tensors.push((format!("{name}.weight"), vec![outputs, inputs, 3, 3]));
        if bias {
            tensors.push((format!("{name}.bias"), vec![outputs]));
        }
    };
    let convs = |half: &str, at: usize| [0, 2, 4].map(|i| format!("{half}.layers.{at}.conv.{i}"));
    // (layer, outputs, inputs, bias); all others are blocks.
    let encoder = [
        (0, 64, 3, true),
        (2, 64, 64, false),
        (6, 64, 64, false),
        (10, 64, 64, false),
        (14, 4, 64, true),
    ];
    let decoder = [
        (0, 64, 4, true),
        (6, 64, 64, false),
        (11, 64, 64, false),
        (16, 64, 64, false),
        (18, 3, 64, true),
    ];
    // Behind the first an activation, and enlargements.
    let none: [&[usize]; 2] = [&[], &[1, 5, 10, 15]];
    for ((half, alone), none) in [("encoder", encoder), ("decoder", decoder)]
        .into_iter()
        .zip(none)
    {
        for at in 0..=alone[4].0 {
            if let Some((_, outputs, inputs, bias)) = alone.iter().find(|conv| conv.0 == at) {
                conv(format!("{half}.layers.{at}"), *outputs, *inputs, *bias);
            } else if !none.contains(&at) {
                for name in convs(half, at) {
                    conv(name, 64, 64, true);
                }
            }
        }
    }
    tensors
}

/// Small values that differ from each other, as a file.
fn file_of(tensors: &[(String, Vec<usize>)]) -> Vec<u8> {
    let bytes: Vec<Vec<u8>> = tensors
        .iter()
        .map(|(_, shape)| {
            let count: usize = shape.iter().product();
            let value = |i: usize| ((i * 7919 % 2003) as f32 / 1001.5 - 1.0) * 0.05;
            (0..count).flat_map(|i| value(i).to_le_bytes()).collect()
        })
        .collect();
    let views = tensors.iter().zip(&bytes).map(|((name, shape), bytes)| {
        let view =
            safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.clone(), bytes);
        (name.clone(), view.unwrap())
    });
    safetensors::serialize(views, None).unwrap()
}

#[test]
fn a_single_file_needs_no_configuration_and_one_without_keys_has_the_published_ones() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let bytes = file_of(&published());
    fs::write(folder.path().join("taesd.safetensors"), &bytes).unwrap();
    let named = folder.path().join("named");
    fs::create_dir(&named).unwrap();
    fs::write(
        named.join("config.json"),
        r#"{"_class_name": "AutoencoderTiny"}"#,
    )
    .unwrap();
    fs::write(named.join("diffusion_pytorch_model.safetensors"), &bytes).unwrap();
    for (vae, output) in [("taesd.safetensors", "a.png"), ("named", "b.png")] {
        run(folder.path(), &format!("in.png -o {output} --vae {vae}")).ends_in(0);
    }
    assert!(pixels(folder.path(), "a.png") == pixels(folder.path(), "b.png"));
}

#[test]
fn the_halves_in_which_taesd_was_first_published_are_refused_with_what_would_do() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    // As madebyollin/taesd has them: lists of layers, the decoder's behind a clamp.
    let renamed = |half: &str, shift: usize| -> Vec<(String, Vec<usize>)> {
        let of_half = |(name, shape): (String, Vec<usize>)| {
            let rest = name.strip_prefix(&format!("{half}.layers."))?;
            let (at, rest) = rest.split_once('.')?;
            let at = at.parse::<usize>().ok()? + shift;
            Some((format!("{at}.{rest}"), shape))
        };
        published().into_iter().filter_map(of_half).collect()
    };
    for (half, shift) in [("encoder", 0), ("decoder", 1)] {
        let name = format!("taesd_{half}.safetensors");
        fs::write(folder.path().join(&name), file_of(&renamed(half, shift))).unwrap();
        let ran = run(folder.path(), &format!("in.png -o out.png --vae {name}"))
            .ends_in(1)
            .says(&[
                &*name,
                &format!("the {half} of TAESD alone"),
                "--vae madebyollin/taesd",
            ]);
        assert_eq!(ran.stderr.matches("TAESD").count(), 1, "{}", ran.stderr);
    }
}

#[test]
fn autoencoders_that_do_not_fit_are_refused_in_one_line() {
    let folder = folder_of(&[("in.png", 8, 8)]);
    let sound = fs::read(data("vae-tiny/config.json")).unwrap();
    let sound: serde_json::Value = serde_json::from_slice(&sound).unwrap();
    let weights = "diffusion_pytorch_model.safetensors";
    fs::create_dir(folder.path().join("vae")).unwrap();
    fs::copy(
        data("vae-tiny").join(weights),
        folder.path().join("vae").join(weights),
    )
    .unwrap();
    for (key, value, said) in [
        // taesd3 and taef1.
        (
            "latent_channels",
            json!(16),
            &["latent_channels 16", "those of SD3 and Flux have 16"][..],
        ),
        (
            "_class_name",
            json!("AutoencoderKLWan"),
            &[
                "_class_name is \"AutoencoderKLWan\"",
                "AutoencoderKL",
                "AutoencoderTiny",
            ],
        ),
        (
            "encoder_block_out_channels",
            json!([12, 12, 24, 12]),
            &[
                "encoder_block_out_channels is [12, 12, 24, 12]",
                "all the same",
            ],
        ),
        (
            "decoder_block_out_channels",
            json!([16, 16, 16]),
            &["decoder_block_out_channels has 3 numbers", "expected 4"],
        ),
        (
            "num_decoder_blocks",
            json!([3, 2, 1]),
            &["num_decoder_blocks has 3 levels"],
        ),
        (
            "num_encoder_blocks",
            json!([1, 0, 2, 2]),
            &["num_encoder_blocks", "do not belong together"],
        ),
        ("latent_channels", json!(3), &["latent_channels 3"]),
        ("shift_factor", json!(0.1159), &["shift_factor is 0.1159"]),
        (
            "upsample_fn",
            json!("bilinear"),
            &["upsample_fn is \"bilinear\""],
        ),
        (
            "upsampling_scaling_factor",
            json!(4),
            &["upsampling_scaling_factor is 4"],
        ),
        (
            "act_fn",
            json!("mish"),
            &["act_fn", "`mish` is not supported"],
        ),
        ("in_channels", json!(4), &["in_channels is 4"]),
    ] {
        let mut edited = sound.clone();
        edited[key] = value;
        let config = serde_json::to_vec(&edited).unwrap();
        fs::write(folder.path().join("vae/config.json"), config).unwrap();
        let ran = run(folder.path(), "in.png -o out.png --vae vae -q")
            .ends_in(1)
            .says(said);
        assert_eq!(ran.stderr.trim_end().lines().count(), 1, "{}", ran.stderr);
        assert!(!folder.path().join("out.png").exists());
    }
}

/// What is raw in files is the KL VAE's whichever VAE is at work, and TAESD's latents are scaled ones already.
#[test]
fn latents_are_read_and_written_alike_with_either_vae() {
    let folder = folder();
    for input in ["marked.latent", "unmarked.latent", "f32.safetensors"] {
        let input = data(&format!("files/{input}"));
        for (name, vae) in [("kl", String::new()), ("taesd", format!(" {}", taesd()))] {
            for kind in ["safetensors", "latent"] {
                let arguments = format!("{} -o {name}.{kind}{vae}", input.display());
                run(folder.path(), &arguments).ends_in(0);
            }
        }
        let read = |name: &str| fs::read(folder.path().join(name)).unwrap();
        assert!(read("kl.safetensors") == read("taesd.safetensors"));
        assert!(read("kl.latent") == read("taesd.latent"));
        // Written and read again, the picture is that of one run.
        run(
            folder.path(),
            &format!("{} -o once.png -p cat {}", input.display(), taesd()),
        )
        .ends_in(0);
        assert!(folder.path().join("once.png").exists());
    }
}

#[test]
fn colours_transparency_and_larger_scales_go_with_it() {
    let folder = folder();
    let rgba = image::RgbaImage::from_fn(20, 12, |x, y| {
        image::Rgba([(x * 12) as u8, (y * 20) as u8, 128, (x * 13) as u8])
    });
    rgba.save(folder.path().join("in.png")).unwrap();
    for (arguments, times) in [
        ("-o a.png --color-fix wavelet", 2),
        ("-o b.png --color-fix adain --dtype bf16", 2),
        ("-o c.png --scale 4", 4),
        ("-o d.png --dtype f16", 2),
    ] {
        run(folder.path(), &format!("in.png {arguments} {}", taesd())).ends_in(0);
        let name = arguments.split(' ').nth(1).unwrap();
        let made = pixels(folder.path(), name);
        assert_eq!(made.dimensions(), (20 * times, 12 * times));
        let alpha = |x: u32| made.get_pixel(x, 0).0[3];
        assert!(alpha(0) < 20 && alpha(20 * times - 1) > 230, "{name}");
    }
    // Half the precision is not another picture: the VAE is float32 on the CPU, and one step of the UNet a few levels away.
    run(folder.path(), &format!("in.png -o e.png {}", taesd())).ends_in(0);
    let (half, full) = (
        pixels(folder.path(), "d.png"),
        pixels(folder.path(), "e.png"),
    );
    let sum: u64 = half
        .iter()
        .zip(full.iter())
        .map(|(a, b)| u64::from(a.abs_diff(*b)))
        .sum();
    let mean = sum as f64 / half.len() as f64;
    assert!(mean < 2.0, "{mean:.2} levels in the mean");
}
