use crate::cli::code::result::{Lines, base64};
use crate::guest::RunnerLines;

/// What a runner says, to the agent and to clients: any octets, in pieces of any length. Nothing of it panics, and how it
/// was cut makes no difference.
pub fn runner(data: &[u8]) {
    let (&step, data) = data.split_first().unwrap_or((&0, data));
    let said = |step: usize| {
        let (mut lines, mut words) = (RunnerLines::default(), Vec::new());
        let end = data.chunks(step).try_for_each(|piece| lines.take(piece, |word| words.push(word)));
        (words, end)
    };
    let told = |step: usize| {
        let (mut lines, mut all) = (Lines::default(), Vec::new());
        data.chunks(step).for_each(|piece| lines.take(piece, |said| all.push(said)));
        all
    };
    let step = usize::from(step) + 1;
    assert_eq!(said(step), said(data.len().max(1)));
    assert_eq!(told(step), told(data.len().max(1)));
    let _ = std::str::from_utf8(data).map(base64);
}
