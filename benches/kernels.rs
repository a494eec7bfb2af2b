//! The CPU kernels at the model's shapes: `cargo bench --bench kernels [-- PART OF A NAME]`; with the environment variable
//! `SD_UPSCALE_KERNELS` set to `avx2` or `portable`, on those instructions.
//!
//! For each: the shortest and the median wall time, the CPU time per thread (what the wall time would be on a machine with
//! nothing else to do), the rate in GFLOP/s by the direct definition (a Winograd convolution may pass the peak), and that
//! rate's share of the machine's peak, which is the GEMM register tile on data in the cache, on all threads.

mod clock;

use std::hint::black_box;
use std::time::Instant;

use clock::cpu_seconds;
use sd_upscale::device::Reuse;
use sd_upscale::kernels::cpu::*;

/// The program's.
#[global_allocator]
static ALLOCATOR: Reuse = Reuse;

fn main() {
    let filter: Vec<String> = std::env::args()
        .skip(1)
        .filter(|a| !a.starts_with('-'))
        .collect();
    let threads = rayon::current_num_threads();
    let one = gemm_rate(256, 1, 0.3);
    println!(
        "{:?}, {threads} threads, GEMM peak {one:.0} GFLOP/s on one",
        Isa::current()
    );
    println!(
        "{:<34} {:>9} {:>9} {:>9} {:>8} {:>8}",
        "", "min ms", "median", "cpu/thr", "GFLOP/s", "of peak"
    );
    let mut bench = Bench {
        filter,
        peak: one * threads as f64,
        threads,
    };

    // UNet, 64x64 latent, then the further widths of 128x128; the weights do not fit the cache, as in the model.
    for (cin, cout, side) in [
        (384, 384, 64),
        (384, 384, 32),
        (768, 768, 16),
        (768, 768, 8),
        (768, 384, 32),
        (1536, 768, 16),
        (768, 384, 64),
        (384, 384, 128),
        (768, 768, 32),
    ] {
        bench.conv(cin, cout, side, 3, Act::Gelu, false);
    }
    bench.conv(768, 384, 64, 1, Act::None, false);
    bench.conv(1536, 768, 16, 1, Act::None, false);
    // VAE decoder for 512x512; the upsamplers' and the outer levels' convolutions are those of larger images too.
    for (cin, cout, side, up) in [
        (512, 512, 64, false),
        (512, 512, 64, true),
        (512, 512, 128, false),
        (512, 256, 256, false),
        (256, 256, 256, false),
        (256, 128, 512, false),
        (128, 128, 512, false),
        (128, 3, 512, false),
    ] {
        bench.conv(
            cin,
            cout,
            side,
            3,
            if up { Act::None } else { Act::Silu },
            up,
        );
    }
    bench.attention("VAE, one head", 1, 4096, 4096, 512);
    bench.attention("VAE, one head", 1, 4096, 65536, 512);
    bench.attention("UNet, self", 12, 256, 256, 64);
    bench.attention("UNet, cross", 6, 4096, 77, 64);
    bench.attention("text", 12, 77, 77, 64);
    bench.attention("base UNet, self", 8, 4096, 4096, 40);
    bench.attention("base UNet, self", 8, 1024, 1024, 80);
    bench.attention("base UNet, cross", 8, 4096, 77, 40);
    bench.linear(4096, 3456, 384);
    bench.linear(77, 768, 3072);
    bench.linear(1, 768, 768);
    bench.pack(768, 768, 3);
    bench.pack(768, 768, 1);
    bench.point();
}

struct Bench {
    filter: Vec<String>,
    /// GFLOP/s on all threads.
    peak: f64,
    threads: usize,
}

impl Bench {
    /// Runs `f` for about a second and prints a line.
    fn run(&mut self, name: &str, flops: f64, mut f: impl FnMut(usize)) {
        if !self.filter.is_empty() && !self.filter.iter().any(|p| name.contains(p.as_str())) {
            return;
        }
        f(0);
        let (mut wall, mut cpu) = (Vec::new(), Vec::new());
        let start = Instant::now();
        while wall.len() < 5 || (start.elapsed().as_secs_f64() < 1.0 && wall.len() < 1000) {
            let (t, c) = (Instant::now(), cpu_seconds());
            f(wall.len() + 1);
            wall.push(t.elapsed().as_secs_f64());
            cpu.push((cpu_seconds() - c) / self.threads as f64);
        }
        let mean_cpu = cpu.iter().sum::<f64>() / cpu.len() as f64;
        wall.sort_by(f64::total_cmp);
        cpu.sort_by(f64::total_cmp);
        // The clock of CPU time is too coarse for short runs.
        let cpu = if mean_cpu > 5e-3 {
            cpu[cpu.len() / 4]
        } else {
            mean_cpu
        };
        let (min, median) = (wall[0], wall[wall.len() / 2]);
        let rate = flops / cpu.min(min) * 1e-9;
        let of_peak = if flops > 0.0 {
            format!("{rate:>8.0} {:>7.0}%", 100.0 * rate / self.peak)
        } else {
            String::new()
        };
        println!(
            "{name:<34} {:>9.3} {:>9.3} {:>9.3} {of_peak}",
            min * 1e3,
            median * 1e3,
            cpu * 1e3
        );
    }

    fn conv(&mut self, cin: usize, cout: usize, side: usize, k: usize, act: Act, up: bool) {
        let name = format!(
            "conv{k}x{k} {cin}->{cout} @{}{}",
            side * if up { 2 } else { 1 },
            if up { " upsampled" } else { "" }
        );
        if !self.filter.is_empty() && !self.filter.iter().any(|p| name.contains(p.as_str())) {
            return;
        }
        let x: Vec<f32> = (0..side * side * cin)
            .map(|i| (i % 97) as f32 / 50.0 - 1.0)
            .collect();
        let weight = vec![0.01; cout * cin * k * k];
        let filter = Filter {
            inputs: cin,
            outputs: cout,
            height: k,
            width: k,
            stride: 1,
            padding: Padding::all(k / 2),
        };
        // Several layers in turn, 100 MB of weights, so that each finds its own out of the cache.
        let layers: Vec<_> = (0..(25_000_000 / weight.len()).clamp(1, 20))
            .map(|_| PackedConv::new(&weight, None, filter))
            .collect();
        let prologue = Prologue::new(vec![0.9; cin], vec![0.1; cin], act);
        let mut input = Input::new(&x, 1, side, side, cin);
        if act != Act::None {
            input = input.prologue(&prologue);
        }
        if up {
            input = input.upsample2x();
        }
        let (_, h, w) = input.shape();
        self.run(&name, (2 * k * k * cin * cout * h * w) as f64, |i| {
            black_box(conv2d::<f32>(
                &input,
                &layers[i % layers.len()],
                None,
                Act::None,
            ));
        });
    }

    fn attention(&mut self, name: &str, heads: usize, nq: usize, nk: usize, d: usize) {
        let (q, k) = (vec![0.1; nq * heads * d], vec![0.1; nk * heads * d]);
        let shape = AttentionShape {
            b: 1,
            heads,
            nq,
            nk,
            d,
            causal: false,
        };
        let name = format!("attention {name} {heads}x{nq}x{nk}x{d}");
        self.run(&name, (4 * heads * nq * nk * d) as f64, |_| {
            black_box(attention(&q, &k, &k, shape, 0.1));
        });
    }

    fn linear(&mut self, n: usize, cin: usize, cout: usize) {
        let x = vec![0.1; n * cin];
        let layer = PackedConv::linear(&vec![0.01; cin * cout], None, cin, cout);
        self.run(
            &format!("linear {n}x{cin}x{cout}"),
            (2 * n * cin * cout) as f64,
            |_| {
                black_box(linear::<f32>(
                    &Input::new(&x, 1, 1, n, cin),
                    &layer,
                    None,
                    Act::None,
                ));
            },
        );
    }

    /// What loading does with each layer's weights.
    fn pack(&mut self, cin: usize, cout: usize, k: usize) {
        let filter = Filter {
            height: k,
            width: k,
            padding: Padding::all(k / 2),
            ..Filter::linear(cin, cout)
        };
        let weight = vec![0.01; cin * cout * k * k];
        self.run(&format!("pack {k}x{k} {cin}->{cout}"), 0.0, |_| {
            black_box(PackedConv::new(&weight, None, filter));
        });
    }

    fn point(&mut self) {
        let (c, side) = (384, 128);
        let x: Vec<f32> = (0..side * side * c)
            .map(|i| (i % 97) as f32 / 50.0 - 1.0)
            .collect();
        let (ones, tokens) = (vec![1.0; c], side * side);
        let at = format!("{c} @{side}");
        let map = Input::new(&x, 1, side, side, c);
        self.run(&format!("group_norm_stats {at}"), 0.0, |_| {
            let mut sums = GroupSums::new(1, c, c / 32);
            sums.add(&map, 0..side);
            black_box(sums.stats(1e-5));
        });
        let prologue = Prologue::new(ones.clone(), ones.clone(), Act::Silu);
        self.run(&format!("materialise norm + silu {at}"), 0.0, |_| {
            black_box(materialise::<f32>(&map.clone().prologue(&prologue)));
        });
        self.run(&format!("layer_norm {tokens}x{c}"), 0.0, |_| {
            black_box(layer_norm(&x, &ones, &ones, 1e-5));
        });
        self.run(&format!("gelu {at}"), 0.0, |_| {
            black_box(activate(&x, Act::Gelu));
        });
        self.run(&format!("downsample_k {at}"), 0.0, |_| {
            black_box(downsample_k::<f32>(&map, 0..side / 2));
        });
        self.run(&format!("upsample_k {at}"), 0.0, |_| {
            black_box(upsample_k::<f32>(&map, 0..2 * side));
        });
    }
}
