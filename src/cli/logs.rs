//! `warren logs`: a sandbox's console, or what its programs log.

use std::io::{self, IsTerminal};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::Args;

use super::Failure;
use super::client::{Client, Event};
use super::output::{Visible, complain, print};
use super::values::parse_duration;
use crate::wire::Request;

/// What may be said of the log.
#[derive(Debug, Args)]
pub struct LogsArgs {
    /// Id or name
    #[arg(value_name = "SANDBOX")]
    id: String,
    /// Go on printing what comes
    #[arg(short, long)]
    follow: bool,
    /// What its programs log, lines of JSON
    #[arg(short, long)]
    guest: bool,
    /// Only so many of the last lines
    #[arg(short = 'n', long, value_name = "N")]
    tail: Option<u64>,
    /// Only what was logged at most so long ago; with --guest, for the console's lines have no time
    #[arg(long, value_name = "TIME", value_parser = parse_duration, requires = "guest")]
    since: Option<Duration>,
}

/// `warren logs`: a log as it is, or on a terminal, so that it cannot drive that. What is lost to a reader that is too slow is
/// said.
pub fn logs(client: &mut Client, args: &LogsArgs) -> Result<u8, Failure> {
    let mut request = Request::new("", "sandbox.logs").arg(&args.id);
    if args.follow {
        request = request.set("follow", true);
    }
    if args.guest {
        request = request.set("source", "guest");
    }
    request = args.tail.iter().fold(request, |request, lines| request.set("tail", lines));
    if let Some(since) = args.since {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        request = request.set("since_ms", now.saturating_sub(since).as_millis());
    }
    let mut shown = io::stdout().is_terminal().then(Visible::default);
    let call = client.start(request)?;
    loop {
        match client.next(&call, None)? {
            Event::Item(fields) => {
                if let Some(lost) = fields.number("lost") {
                    complain(&format!("warning: at least {lost} octets are lost here"));
                }
            }
            Event::Data { channel, payload } => {
                match &mut shown {
                    Some(shown) => print(shown.take(&payload))?,
                    None => print(&payload)?,
                }
                client.consumed(&call, &channel, payload.len());
            }
            Event::End { .. } => {}
            Event::Done(result) => {
                if let Some(shown) = &mut shown {
                    print(shown.end())?;
                }
                result?;
                return Ok(0);
            }
        }
    }
}
