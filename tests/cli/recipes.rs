//! The recipes of `examples/` that need no more than a shell, run on the built-in model; of the others what can be had.

use std::ffi::OsString;
use std::process::Command;

use super::setup::*;

/// A recipe, in `folder`, to which `sd-upscale` is this program.
fn recipe(folder: &Path, name: &str) -> Command {
    let of_program = program(folder);
    let mut command = Command::new("sh");
    command.current_dir(folder);
    for (variable, value) in of_program.get_envs() {
        match value {
            Some(value) => command.env(variable, value),
            None => command.env_remove(variable),
        };
    }
    let here = Path::new(of_program.get_program()).parent().unwrap();
    let mut path = OsString::from(here);
    path.push(":");
    path.push(std::env::var_os("PATH").unwrap());
    command.env("PATH", path);
    command.arg(example(name));
    command
}

fn example(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("examples")
        .join(name)
}

/// Whether a program is there; where not, what was to be run with it is passed over by name.
fn is_there(name: &str) -> bool {
    let there = Command::new(name).arg("--version").output().is_ok();
    if !there {
        println!("passed over {name}: it is not there");
    }
    there
}

const TINY: [&str; 4] = ["--model", "tiny", "-s", "1"];

/// Eight small pictures in `in`.
fn eight() -> TempDir {
    let names: Vec<String> = (0..8).map(|i| format!("in/{i}.png")).collect();
    let pictures: Vec<_> = names.iter().map(|name| (&**name, 8, 8)).collect();
    folder_of(&pictures)
}

#[test]
fn find_and_xargs_take_any_name() {
    let names = ["-p.png", "a b.png", "line\nbreak.png", "it's \"$HOME\".png"];
    let pictures = names.map(|name| format!("in/{name}"));
    let folder = folder_of(&pictures.each_ref().map(|name| (&**name, 8, 8)));
    picture(folder.path(), "in/old.png", 8, 8);
    let old = fs::File::options()
        .write(true)
        .open(folder.path().join("in/old.png"))
        .unwrap();
    old.set_modified(std::time::SystemTime::UNIX_EPOCH).unwrap();
    let mut command = recipe(folder.path(), "find_xargs.sh");
    finish_ok(command.args(["in", "-out"]).args(TINY));
    let mut expected = names.map(str::to_owned).to_vec();
    expected.sort();
    assert_eq!(files(&folder.path().join("-out")), expected);
}

#[track_caller]
fn finish_ok(command: &mut Command) -> Ran {
    let command = std::mem::replace(command, Command::new("true"));
    finish(command, b"").ends_in(0)
}

#[test]
fn the_tasks_of_a_slurm_array_do_each_picture_once() {
    let folder = eight();
    let mut done = Vec::new();
    for task in 5..8 {
        let mut command = recipe(folder.path(), "slurm.sh");
        command
            .env("SLURM_ARRAY_TASK_ID", task.to_string())
            .env("SLURM_ARRAY_TASK_MIN", "5")
            .env("SLURM_ARRAY_TASK_COUNT", "3");
        let ran = finish_ok(command.args(["in", "out", "--json"]).args(TINY));
        done.extend(ran.json().iter().map(|line| line["output"].to_string()));
    }
    done.sort();
    done.dedup();
    assert_eq!(done.len(), 8);
    assert_eq!(files(&folder.path().join("out")).len(), 8);
}

#[test]
fn the_pods_of_a_kubernetes_job_do_each_picture_once() {
    let job = fs::read_to_string(example("kubernetes.yaml")).unwrap();
    let image = format!("image: sd-upscale:{}\n", env!("CARGO_PKG_VERSION"));
    assert!(job.contains(&image), "{image}");
    assert!(job.contains("completions: 8\n"), "{job}");
    let arguments = job
        .lines()
        .find_map(|line| line.trim().strip_prefix("args: [")?.strip_suffix(']'));
    let arguments = arguments.unwrap().replace("/data/photos", "in");
    let arguments = arguments.replace("/data/", "");
    let folder = eight();
    let mut done = 0;
    for pod in 0..8 {
        let arguments = arguments.replace("$(JOB_COMPLETION_INDEX)", &pod.to_string());
        let mut command = program(folder.path());
        finish_ok(command.args(arguments.split(", ")).args(TINY));
        let now = folder.path().join("upscaled");
        let now = if now.exists() { files(&now).len() } else { 0 };
        assert!(now >= done);
        done = now;
    }
    assert_eq!(done, 8);
}

#[test]
fn gnu_parallel_shares_a_folder_out() {
    if !is_there("parallel") {
        return;
    }
    let folder = eight();
    let mut command = recipe(folder.path(), "parallel.sh");
    command.env("CARDS", "0").env("JOBS", "3");
    command.env("HOME", folder.path());
    finish_ok(
        command
            .args(["in", "out", "-p", "it's a \"cat\""])
            .args(TINY),
    );
    assert_eq!(files(&folder.path().join("out")).len(), 8);
}

#[test]
fn comfyui_latents_come_out_as_pictures_and_as_latents() {
    let folder = folder();
    fs::create_dir(folder.path().join("in")).unwrap();
    let latent = data("files/marked.latent");
    fs::copy(latent, folder.path().join("in/a.latent")).unwrap();
    for (format, output) in [("png", "a.png"), ("latent", "a.latent")] {
        let mut command = recipe(folder.path(), "comfy_latents.sh");
        command.env("FORMAT", format);
        let model = data("model");
        command
            .args(["in", format, "-s", "1", "--model"])
            .arg(model);
        finish_ok(&mut command);
        assert_eq!(files(&folder.path().join(format)), [output]);
    }
}
