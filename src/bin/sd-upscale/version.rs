//! `--version`: what this program was built from and with, and what it finds to compute with.

use std::sync::LazyLock;

use sd_upscale::kernels::cpu::Isa;

/// Digits of a commit that are shown: all of SHA-1's.
const DIGITS: usize = 40;

/// The commit that was checked out when the program was compiled; None outside a clone. Only it gets into the program, not git's log.
const CHECKED_OUT: Option<[u8; DIGITS]> = match include!(concat!(env!("OUT_DIR"), "/head_log.rs")) {
    Some(log) => last_commit(log),
    None => None,
};

/// Version, commit, features and CPU kernels, a line each.
pub fn in_full() -> &'static str {
    static TEXT: LazyLock<String> = LazyLock::new(|| {
        let version = env!("CARGO_PKG_VERSION");
        let commit = commit().map_or(String::new(), |commit| format!("\ncommit: {commit}"));
        let (features, kernels) = (features(), kernels());
        format!("{version}{commit}\nfeatures: {features}\nCPU kernels: {kernels}")
    });
    &TEXT
}

/// What whoever builds it says it is of, where git does not.
fn commit() -> Option<&'static str> {
    let told = option_env!("SD_UPSCALE_COMMIT").filter(|commit| !commit.is_empty());
    let found = CHECKED_OUT.as_ref();
    told.or_else(|| found.and_then(|digits| str::from_utf8(digits).ok()))
}

fn features() -> &'static str {
    match (cfg!(feature = "cuda"), cfg!(feature = "cudnn")) {
        (_, true) => "cuda, cudnn",
        (true, false) => "cuda",
        (false, false) => "none",
    }
}

/// Those that this machine can run, the fastest first, and the one that computes.
fn kernels() -> String {
    let names: Vec<String> = Isa::available().into_iter().map(name).collect();
    let used = match Isa::chosen() {
        Ok(isa) => format!("{} computes", name(isa)),
        Err(error) => error,
    };
    format!("{}; {used}", names.join(", "))
}

/// As the environment variable has it.
pub fn name(isa: Isa) -> String {
    format!("{isa:?}").to_lowercase()
}

/// The commit that the last line of git's log of a reference came to: `OLD NEW NAME <EMAIL> TIME ZONE<tab>WHY`.
const fn last_commit(log: &[u8]) -> Option<[u8; DIGITS]> {
    let mut end = log.len();
    while end > 0 && log[end - 1] == b'\n' {
        end -= 1;
    }
    let mut start = end;
    while start > 0 && log[start - 1] != b'\n' {
        start -= 1;
    }
    while start < end && log[start] != b' ' {
        start += 1;
    }
    start += 1;
    let mut digits = [0; DIGITS];
    let mut at = 0;
    while at < DIGITS {
        if start + at >= end || !log[start + at].is_ascii_hexdigit() {
            return None;
        }
        digits[at] = log[start + at];
        at += 1;
    }
    Some(digits)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_of_the_log_has_the_commit() {
        let line = |new: &str| {
            let old = "0".repeat(DIGITS);
            format!("{old} {new} A Person <a@b.c> 1700000000 +0000\tcommit: words and {old}\n")
        };
        let (first, second) = ("1".repeat(DIGITS), "abcdef0123".repeat(4));
        let log = line(&first) + &line(&second);
        assert_eq!(last_commit(log.as_bytes()).unwrap(), second.as_bytes());
        assert_eq!(
            last_commit(log.trim_end().as_bytes()).unwrap(),
            second.as_bytes()
        );
        for wrong in [
            "",
            "\n",
            "words",
            "0 1",
            &line("abc"),
            &line(&"g".repeat(DIGITS)),
        ] {
            assert_eq!(last_commit(wrong.as_bytes()), None, "{wrong}");
        }
    }
}
