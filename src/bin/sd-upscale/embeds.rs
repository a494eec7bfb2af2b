//! `--prompt-embeds`: prompts in numbers, one for all or each for its own.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use sd_upscale::PromptEmbeds;
use sd_upscale::plan::{Numbered, Plan, Task, UsageError};

/// The prompts of a file, one at least.
pub struct Embeds {
    file: PathBuf,
    first: PromptEmbeds,
    others: Vec<PromptEmbeds>,
    /// Of the run.
    inputs: usize,
}

impl Embeds {
    /// # Errors
    /// It is no such file.
    pub fn read(file: &Path) -> Result<Self, UsageError> {
        let name = file.display();
        let rows = PromptEmbeds::read(file);
        let mut rows = rows
            .map_err(|error| UsageError(format!("--prompt-embeds {name}: {error:#}")))?
            .into_iter();
        let first = rows.next();
        Ok(Self {
            file: file.into(),
            first: first.ok_or_else(|| UsageError(format!("--prompt-embeds {name}: no rows")))?,
            others: rows.collect(),
            inputs: 1,
        })
    }

    /// The first of them.
    pub fn first(&self) -> &PromptEmbeds {
        &self.first
    }

    fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// Spreads them over the inputs: as many as these, or one for all; one input may hold as many latents.
    ///
    /// # Errors
    /// There are not.
    pub fn spread(&mut self, plan: &Plan, watches: bool) -> Result<(), UsageError> {
        let (count, inputs) = (self.count(), plan.inputs);
        self.inputs = inputs;
        if count == 1 || (!watches && (inputs == 1 || count == inputs)) {
            return Ok(());
        }
        if watches {
            return Err(UsageError(format!(
                "--prompt-embeds {} holds {count} prompts, and --watch cannot tell whose they are: give one for all",
                self.file.display()
            )));
        }
        Err(UsageError(format!(
            "--prompt-embeds {} holds {count} prompts, and there are {inputs} inputs: give one for all, or as many",
            self.file.display()
        )))
    }

    /// That of one picture, `numbered` where its file holds several.
    ///
    /// # Errors
    /// A file does not hold as many latents as there are prompts.
    pub fn of(&self, task: &Task, numbered: Option<Numbered>) -> Result<&PromptEmbeds> {
        let index = match (self.count(), self.inputs, numbered) {
            (1, ..) => 0,
            (count, 1, numbered) => {
                let Numbered {
                    number,
                    count: found,
                } = numbered.unwrap_or(Numbered {
                    number: 1,
                    count: 1,
                });
                ensure!(
                    found == count,
                    "--prompt-embeds {} holds {count} prompts, and this input {found} pictures: give one for all, or as many",
                    self.file.display()
                );
                number - 1
            }
            _ => task.place,
        };
        let of_others = index
            .checked_sub(1)
            .and_then(|index| self.others.get(index));
        Ok(of_others.unwrap_or(&self.first))
    }
}
