use sd_upscale::kernels::*;
use std::time::Instant;
fn cpu() -> f64 {
    let mut u: libc::rusage = unsafe { std::mem::zeroed() };
    unsafe { libc::getrusage(libc::RUSAGE_SELF, &mut u) };
    let f = |t: libc::timeval| t.tv_sec as f64 + t.tv_usec as f64 * 1e-6;
    f(u.ru_utime) + f(u.ru_stime)
}
fn time(mut f: impl FnMut()) -> (f64, f64, f64) {
    let mut t = Vec::new();
    let mut c = Vec::new();
    f();
    let start = Instant::now();
    while t.len() < 5 || (start.elapsed().as_secs_f64() < 1.0 && t.len() < 100) {
        let (s, k) = (Instant::now(), cpu());
        f();
        t.push(s.elapsed().as_secs_f64());
        c.push(cpu() - k);
    }
    t.sort_by(f64::total_cmp);
    c.sort_by(f64::total_cmp);
    (t[0] * 1e3, t[t.len() / 2] * 1e3, c[c.len() / 4] * 500.0)
}
fn main() {
    let only = std::env::args().nth(1).unwrap_or_default();
    for (c, o, hw) in [
        (384, 384, 128),
        (384, 384, 64),
        (384, 384, 32),
        (768, 768, 32),
        (768, 768, 16),
        (768, 768, 8),
        (1536, 768, 16),
        (768, 384, 32),
        (768, 384, 64),
        (512, 512, 64),
        (512, 512, 128),
        (256, 256, 256),
        (128, 128, 512),
        (128, 3, 512),
    ] {
        let name = format!("{c}->{o}@{hw}");
        if !only.starts_with('-') && !name.contains(&only) {
            continue;
        }
        let x = vec![0.5f32; c * hw * hw];
        let w = vec![0.01f32; c * o * 9];
        let conv = PackedConv::new(&w, Some(&vec![0.1; o]), (o, c), (3, 3), 1, [1; 4]);
        let (min, med, cpu) = time(|| {
            std::hint::black_box(conv2d(&Input::new(&x, 1, hw, hw, c), &conv, None));
        });
        let gf = (2 * 9 * c * o * hw * hw) as f64 / 1e6;
        println!(
            "conv3x3 {name}: min {min:.2} med {med:.2} cpu/2 {cpu:.2} ms  {:.0} GFLOP/s, {:.0} by cpu",
            gf / min,
            gf / cpu
        );
    }
}
