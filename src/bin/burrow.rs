//! The guest agent: PID 1 of every sandbox. See `warren::guest`.

use std::process::ExitCode;

fn main() -> ExitCode {
    warren::guest::main()
}
