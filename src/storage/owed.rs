//! Removals that the database refused, for want of room as a rule: what they were about is gone, and nobody but the
//! database knows of the row any more. They are made as soon as there is room.

use std::collections::HashSet;

use super::schema::Change;
use super::state::{Job, StateError};

/// What a row is found by: its table, and its key there.
type Row<'a> = (&'static str, &'a str, u64);

/// The removals that are not made.
#[derive(Default)]
pub(super) struct Owed(Vec<Job>);

impl Owed {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Makes those whose rows are not put anew in the batch that comes next. `write` makes all of them or none.
    pub(super) fn settle(&mut self, next: &[Job], write: impl FnOnce(&[Job]) -> Result<(), StateError>) {
        if self.0.is_empty() {
            return;
        }
        let anew: HashSet<Row> = next.iter().filter_map(|job| put(&job.change)).collect();
        self.0.retain(|job| removed(&job.change).is_some_and(|row| !anew.contains(&row)));
        if write(&self.0).is_ok() {
            self.0.clear();
        }
    }

    /// Keeps what of a batch was refused and is a removal, unless its row was put anew after it. `results` are the batch's.
    pub(super) fn keep<'a>(&mut self, batch: Vec<Job>, results: impl IntoIterator<Item = &'a Result<(), StateError>>) {
        let refused: Vec<bool> = results.into_iter().map(Result::is_err).collect();
        let is_owed = |(at, job): (usize, &Job)| {
            let row = removed(&job.change).filter(|_| refused[at]);
            row.is_some_and(|row| !batch[at..].iter().any(|later| put(&later.change) == Some(row)))
        };
        let owed: Vec<bool> = batch.iter().enumerate().map(is_owed).collect();
        self.0.extend(batch.into_iter().zip(owed).filter(|(_, owed)| *owed).map(|(job, _)| job));
    }
}

/// The row that a removal is of. Those of snapshots and layers are not here: whoever removes one waits for the result.
fn removed(change: &Change) -> Option<Row<'_>> {
    match change {
        Change::RemoveSandbox { id } => Some(("sandbox", id, 0)),
        Change::RemoveTemplate { name } => Some(("template", name, 0)),
        Change::RemoveExecution { sandbox_id, exec_id } => Some(("execution", sandbox_id, *exec_id)),
        Change::RemoveAllocation { sandbox_id } => Some(("allocation", sandbox_id, 0)),
        _ => None,
    }
}

/// The row that is put.
fn put(change: &Change) -> Option<Row<'_>> {
    match change {
        Change::PutSandbox(row) => Some(("sandbox", &row.id, 0)),
        Change::PutTemplate(row) => Some(("template", &row.name, 0)),
        Change::PutExecution(row) => Some(("execution", &row.sandbox_id, row.exec_id)),
        Change::PutAllocation(row) => Some(("allocation", &row.sandbox_id, 0)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::schema::{SandboxRow, TemplateRow};
    use super::*;

    fn jobs(changes: impl IntoIterator<Item = Change>) -> Vec<Job> {
        changes.into_iter().map(Job::of).collect()
    }

    #[test]
    fn a_removal_that_was_refused_is_made_later_unless_its_row_is_put_anew() {
        let full = Err(StateError::DiskFull(String::new()));
        let remove = |id: &str| Change::RemoveSandbox { id: id.to_string() };
        let template = || Change::RemoveTemplate { name: "t".to_string() };
        let other = Change::PutSandbox(Box::new(SandboxRow { id: "b".to_string(), ..SandboxRow::default() }));
        let mut owed = Owed::default();
        owed.keep(jobs([remove("a"), other, template(), remove("c")]), [&full, &full, &full, &Ok(())]);
        let mut tried = Vec::new();
        let mut settle = |owed: &mut Owed, next: &[Job], result: &Result<(), StateError>| {
            owed.settle(next, |jobs| {
                tried.push(jobs.iter().map(|job| job.change.clone()).collect::<Vec<_>>());
                result.clone()
            });
        };
        settle(&mut owed, &[], &full);
        assert!(!owed.is_empty());
        let anew = jobs([Change::PutTemplate(TemplateRow { name: "t".to_string(), ..TemplateRow::default() })]);
        settle(&mut owed, &anew, &Ok(()));
        assert!(owed.is_empty());
        settle(&mut owed, &[], &Ok(()));
        assert_eq!(tried, [vec![remove("a"), template()], vec![remove("a")]]);
        // Also where that is in the same batch.
        let put = || Change::PutTemplate(TemplateRow { name: "t".to_string(), ..TemplateRow::default() });
        owed.keep(jobs([put(), template()]), [&full, &full]);
        assert!(!owed.is_empty());
        owed.settle(&jobs([put()]), |_| Ok(()));
        owed.keep(jobs([template(), put()]), [&full, &Ok(())]);
        assert!(owed.is_empty());
    }
}
