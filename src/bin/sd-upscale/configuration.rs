//! `sd-upscale.toml`: defaults for options, which the command line overrides.

use std::ffi::OsString;
use std::path::PathBuf;
use std::{fs, io};

use clap::{Arg, ArgAction, Command, Id};
use sd_upscale::plan::UsageError;
use toml::{Table, Value};

/// The file's name.
const NAME: &str = "sd-upscale.toml";
/// Options that are no defaults but things to do.
const NO_DEFAULTS: [&str; 8] = [
    "help",
    "version",
    "check-device",
    "list-devices",
    "completions",
    "man",
    "convert",
    "export-tiny",
];

/// What a configuration file says.
pub struct Configuration {
    path: PathBuf,
    entries: Vec<Entry>,
}

struct Entry {
    /// The option's, as clap calls it.
    id: Id,
    /// As in the file.
    text: String,
    arguments: Vec<OsString>,
}

impl Configuration {
    /// That of the current folder, else that of the user's configuration folder; None where there is neither.
    ///
    /// # Errors
    /// It cannot be read, is no TOML, or says what is no option's default.
    pub fn find(command: &Command) -> Result<Option<Self>, UsageError> {
        let users = dirs::config_dir().map(|folder| folder.join(NAME));
        for path in [Some(PathBuf::from(NAME)), users].into_iter().flatten() {
            match fs::read_to_string(&path) {
                Ok(text) => return Self::of(path, &text, command).map(Some),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => {
                    let path = path.display();
                    return Err(UsageError(format!("cannot read {path}: {error}")));
                }
            }
        }
        Ok(None)
    }

    fn of(path: PathBuf, text: &str, command: &Command) -> Result<Self, UsageError> {
        let wrong = |what: String| UsageError(format!("{}: {what}", path.display()));
        let no_toml = |error: toml::de::Error| {
            let line = error
                .span()
                .map_or(1, |span| 1 + text[..span.start].matches('\n').count());
            wrong(format!("line {line}: {}", error.message()))
        };
        let table: Table = text.parse().map_err(no_toml)?;
        let entry = |(key, value): (String, Value)| {
            let option = command
                .get_arguments()
                .find(|arg| arg.get_long() == Some(&key) && !NO_DEFAULTS.contains(&&*key));
            let Some(option) = option else {
                return Err(wrong(format!(
                    "`{key}` is no option that has a default; expected the long name of one without its dashes, such as steps = 12"
                )));
            };
            Ok(Entry {
                id: option.get_id().clone(),
                arguments: arguments(&key, &value, option).map_err(wrong)?,
                text: format!("{key} = {value}"),
            })
        };
        let entries = table.into_iter().map(entry).collect::<Result<_, _>>()?;
        Ok(Self { path, entries })
    }

    /// Leaves out what the command line says, or says the opposite of: `given`.
    pub fn under(mut self, command: &Command, given: &[Id]) -> Self {
        let find = |id: &Id| command.get_arguments().find(|arg| arg.get_id() == id);
        let conflicts = |a: &Id, b: &Id| {
            let of = |id| find(id).map(|arg| command.get_arg_conflicts_with(arg));
            of(a).is_some_and(|all| all.iter().any(|arg| arg.get_id() == b))
        };
        self.entries.retain(|entry| {
            let id = &entry.id;
            let differs = |one: &Id| one != id && !conflicts(one, id) && !conflicts(id, one);
            given.iter().all(differs)
        });
        self
    }

    /// As they would stand before what the command line says.
    pub fn arguments(&self) -> impl Iterator<Item = OsString> {
        self.entries
            .iter()
            .flat_map(|entry| entry.arguments.clone())
    }

    /// The file and what of it counts, in words.
    pub fn in_words(&self) -> String {
        let entries: Vec<&str> = self.entries.iter().map(|entry| &*entry.text).collect();
        format!("{}: {}", self.path.display(), entries.join(", "))
    }

    /// The file's name.
    pub fn name(&self) -> String {
        self.path.display().to_string()
    }
}

/// What stands for an option and its value on the command line.
fn arguments(key: &str, value: &Value, option: &Arg) -> Result<Vec<OsString>, String> {
    let is_flag = matches!(option.get_action(), ArgAction::SetTrue);
    let with = |value: String| OsString::from(format!("--{key}={value}"));
    match (value, is_flag) {
        (Value::Boolean(true), true) => Ok(vec![format!("--{key}").into()]),
        (Value::Boolean(false), true) => Ok(Vec::new()),
        (_, true) => Err(format!("{key} = {value}: expected true or false")),
        (Value::Array(values), false) => {
            let each = values.iter().map(|value| plain(key, value));
            let each = each.collect::<Result<Vec<String>, String>>()?;
            Ok(if matches!(option.get_action(), ArgAction::Append) {
                each.into_iter().map(with).collect()
            } else {
                vec![with(each.join(","))]
            })
        }
        (value, false) => Ok(vec![with(plain(key, value)?)]),
    }
}

fn plain(key: &str, value: &Value) -> Result<String, String> {
    match value {
        Value::String(text) => Ok(text.clone()),
        Value::Integer(_) | Value::Float(_) => Ok(value.to_string()),
        _ => Err(format!(
            "{key} = {value}: expected a text or a number, or several in [ ]"
        )),
    }
}
