//! What bounds each layer of the published configuration on this machine: `cargo bench --bench roofline [-- unet64 unet128 decode512
//! decode1024]`.
//!
//! A network is run on shapes, which lists its layers. Each kind of layer is then timed alone, its weights out of the cache as in the
//! network, beside the shortest time that this machine allows: its multiplications and additions (those that the algorithm does, which for
//! 3x3 convolutions are a quarter or a fifth of the direct ones; transforms not counted) at the measured peak of matrix products on data in
//! the cache, and its bytes (weights, maps read and written once) at the measured bandwidth of memory. The larger of the two is the bound.

use std::hint::black_box;
use std::time::Instant;

use candle_core::{DType, Device};
use rayon::prelude::*;
use sd_upscale::ModelFiles;
use sd_upscale::device::{Placement, Reuse};
use sd_upscale::kernels::cpu::*;
use sd_upscale::model::PartFiles;
use sd_upscale::networks::unet::{UNet, UNetConfig};
use sd_upscale::networks::vae::{Decoder, VaeConfig};
use sd_upscale::networks::{Room, Work, works, zeros_without_memory};

/// The program's.
#[global_allocator]
static ALLOCATOR: Reuse = Reuse;

fn main() -> anyhow::Result<()> {
    let wanted: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let machine = Machine::measured();
    println!(
        "{:?}, {} threads: {:.0} GFLOP/s in matrix products, {:.1} GB/s read, {:.1} GB/s copied",
        Isa::current(),
        rayon::current_num_threads(),
        machine.flops * 1e-9,
        machine.read * 1e-9,
        machine.copied * 1e-9,
    );
    for (name, side) in [
        ("unet64", 64),
        ("unet128", 128),
        ("decode512", 64),
        ("decode1024", 128),
    ] {
        if wanted.is_empty() || wanted.iter().any(|part| part == name) {
            let layers = if name.starts_with("unet") {
                unet(side)?
            } else {
                decoder(side)?
            };
            report(name, &layers, &machine);
        }
    }
    Ok(())
}

/// Layers of a step of the UNet over latents (1, 4, side, side).
fn unet(side: usize) -> anyhow::Result<Vec<Work>> {
    let placement = Placement::new(&Device::Cpu, DType::F32).shapes();
    let config: UNetConfig = ModelFiles::published_configurations().json("unet/config.json")?;
    let unet = UNet::of_shapes(config, &placement)?;
    works(|| unet.measure((1, side, side), &Room::unlimited()))
}

/// Layers of the decoder for latents (1, 4, side, side).
fn decoder(side: usize) -> anyhow::Result<Vec<Work>> {
    let placement = Placement::new(&Device::Cpu, DType::F32).shapes();
    let config = VaeConfig::load(&PartFiles {
        files: ModelFiles::published_configurations(),
        part: "vae",
        weights: None,
    })?;
    let latents = zeros_without_memory((1, config.latent_channels(), side, side), DType::F32)?;
    let decoder = Decoder::of_shapes(&config, &placement)?;
    works(|| decoder.decode_within(&latents, &Room::unlimited(), |_| Ok(())))
}

/// What the machine can do at most, in operations and bytes a second, all threads together.
struct Machine {
    flops: f64,
    read: f64,
    copied: f64,
}

impl Machine {
    fn measured() -> Self {
        let threads = rayon::current_num_threads();
        // 512 MB, more than caches hold.
        let from = vec![1f32; 128 << 20];
        let mut to = vec![0f32; from.len()];
        let bytes = (from.len() * size_of::<f32>()) as f64;
        let part = from.len() / threads / 8;
        let read = best(5, || {
            let sums = from.par_chunks(part).map(|part| {
                let eight = part.chunks_exact(64).map(|line| line.iter().sum::<f32>());
                eight.sum::<f32>()
            });
            black_box(sums.sum::<f32>());
        });
        let copied = best(5, || {
            to.par_chunks_mut(part)
                .zip(from.par_chunks(part))
                .for_each(|(to, from)| to.copy_from_slice(from));
            black_box(&to);
        });
        Self {
            flops: 1e9 * gemm_rate(256, 1, 0.3) * threads as f64,
            read: bytes / read,
            copied: 2.0 * bytes / copied,
        }
    }
}

/// The shortest of some runs, in seconds.
fn best(runs: usize, mut run: impl FnMut()) -> f64 {
    run();
    let timed = |_| {
        let start = Instant::now();
        run();
        start.elapsed().as_secs_f64()
    };
    (0..runs).map(timed).fold(f64::MAX, f64::min)
}

/// Of one kind of layer.
struct Measured {
    name: String,
    /// Operations by the direct definition, and those that are done.
    direct: f64,
    done: f64,
    /// Bytes of weights and of maps, read and written once.
    bytes: f64,
    seconds: f64,
}

fn report(name: &str, layers: &[Work], machine: &Machine) {
    println!(
        "\n{name}\n{:<38} {:>3} {:>9} {:>9} {:>8} {:>8} {:>7} {:>6}",
        "layer", "n", "ms each", "ms all", "of peak", "GB/s", "bound", "share"
    );
    let mut kinds: Vec<(Work, usize)> = Vec::new();
    for &layer in layers {
        match kinds.iter_mut().find(|(kind, _)| *kind == layer) {
            Some((_, count)) => *count += 1,
            None => kinds.push((layer, 1)),
        }
    }
    let mut rows: Vec<(Measured, usize)> = kinds
        .into_iter()
        .map(|(kind, count)| (measured(kind), count))
        .collect();
    let all = |of: &dyn Fn(&Measured) -> f64| -> f64 {
        rows.iter()
            .map(|(row, count)| of(row) * *count as f64)
            .sum()
    };
    let bound = |row: &Measured| (row.done / machine.flops).max(row.bytes / machine.read);
    let (seconds, bounds, direct) = (all(&|row| row.seconds), all(&bound), all(&|row| row.direct));
    let (computing, moving) = (
        all(&|row| row.done) / machine.flops,
        all(&|row| row.bytes) / machine.read,
    );
    rows.sort_by(|(a, n), (b, m)| (b.seconds * *m as f64).total_cmp(&(a.seconds * *n as f64)));
    for (row, count) in &rows {
        let which = if row.done / machine.flops > row.bytes / machine.read {
            "compute"
        } else {
            "memory"
        };
        println!(
            "{:<38} {count:>3} {:>9.2} {:>9.1} {:>7.0}% {:>8.1} {:>7.2} {which}",
            row.name,
            row.seconds * 1e3,
            row.seconds * 1e3 * *count as f64,
            100.0 * row.direct / row.seconds / machine.flops,
            row.bytes / row.seconds * 1e-9,
            bound(row) / row.seconds,
        );
    }
    println!(
        "all: {:.0} ms; bound {:.0} ms ({:.2} of it): {:.0} ms of operations, {:.0} ms of bytes; {:.0} % of the peak by direct operations",
        seconds * 1e3,
        bounds * 1e3,
        bounds / seconds,
        computing * 1e3,
        moving * 1e3,
        100.0 * direct / seconds / machine.flops,
    );
}

/// Times a layer alone.
fn measured(work: Work) -> Measured {
    match work {
        Work::Convolution {
            b,
            h,
            w,
            inputs,
            outputs,
            kernel,
            stride,
            upsampled,
        } => {
            let factor = if upsampled { 2 } else { 1 };
            let (ih, iw) = (h * stride / factor, w * stride / factor);
            let padding = match (stride, kernel) {
                (1, _) => Padding::all(kernel / 2),
                _ => Padding {
                    top: 0,
                    left: 0,
                    ..Padding::all(kernel / 2)
                },
            };
            let filter = Filter {
                inputs,
                outputs,
                height: kernel,
                width: kernel,
                stride,
                padding,
            };
            let layers = layers(filter);
            let x = values(b * ih * iw * inputs);
            // As a norm with its activation reads it.
            let prologue = Prologue::new(vec![0.9; b * inputs], vec![0.1; b * inputs], Act::Silu);
            let mut input = Input::new(&x, b, ih, iw, inputs);
            if upsampled {
                input = input.upsample2x();
            } else {
                input = input.prologue(&prologue);
            }
            let (_, th, tw) = input.shape();
            let mut turn = 0;
            let seconds = best(3, || {
                turn += 1;
                black_box(conv2d::<f32>(
                    &input,
                    &layers[turn % layers.len()],
                    None,
                    Act::None,
                ));
            });
            let weights = inputs * outputs * kernel * kernel;
            Measured {
                name: format!(
                    "conv{kernel}x{kernel} {inputs}->{outputs} @{h}x{w}{}",
                    if upsampled { " up" } else { "" }
                ),
                direct: (2 * weights * b * h * w) as f64,
                done: b as f64 * layers[0].work(th, tw),
                bytes: 4.0 * (weights + b * ih * iw * inputs + b * h * w * outputs) as f64,
                seconds,
            }
        }
        Work::Product {
            rows,
            inner,
            columns,
        } => {
            let layers = layers(Filter::linear(inner, columns));
            let x = values(rows * inner);
            let input = Input::new(&x, 1, 1, rows, inner);
            let mut turn = 0;
            let seconds = best(5, || {
                turn += 1;
                black_box(linear::<f32>(
                    &input,
                    &layers[turn % layers.len()],
                    None,
                    Act::None,
                ));
            });
            let work = (2 * rows * inner * columns) as f64;
            Measured {
                name: format!("product {rows}x{inner}x{columns}"),
                direct: work,
                done: work,
                bytes: 4.0 * (inner * columns + rows * inner + rows * columns) as f64,
                seconds,
            }
        }
        Work::Attention {
            b,
            rows,
            width,
            keys,
            heads,
        } => {
            let (q, k) = (values(b * rows * width), values(b * keys * width));
            let shape = AttentionShape {
                b,
                heads,
                nq: rows,
                nk: keys,
                d: width / heads,
                causal: false,
            };
            let seconds = best(3, || {
                black_box(attention(&q, &k, &k, shape, 0.1));
            });
            let work = (4 * b * rows * width * keys) as f64;
            Measured {
                name: format!("attention {heads}x{rows}x{keys}x{}", width / heads),
                direct: work,
                done: work,
                bytes: 4.0 * (2 * q.len() + 2 * k.len()) as f64,
                seconds,
            }
        }
    }
}

fn values(count: usize) -> Vec<f32> {
    (0..count).map(|i| (i % 97) as f32 / 50.0 - 1.0).collect()
}

/// Several of one filter, 100 MB of weights, so that each finds its own out of the cache.
fn layers(filter: Filter) -> Vec<PackedConv> {
    let weight = vec![0.01; filter.inputs * filter.outputs * filter.height * filter.width];
    (0..(25_000_000 / weight.len()).clamp(1, 20))
        .map(|_| PackedConv::new(&weight, None, filter))
        .collect()
}
