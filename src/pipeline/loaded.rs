//! Networks are read when they are first needed.

use anyhow::Result;

use super::types::{Event, OnEvent, Stage};

/// What `slot` holds, which is read first where there is nothing yet.
///
/// # Errors
/// Those of `load` and of `on_event`.
pub fn loaded<'a, T>(
    slot: &'a mut Option<T>,
    stage: Stage,
    on_event: OnEvent,
    load: impl FnOnce() -> Result<T>,
) -> Result<&'a T> {
    match slot {
        Some(network) => Ok(network),
        None => {
            on_event(Event::Loading(stage))?;
            Ok(slot.insert(load()?))
        }
    }
}
