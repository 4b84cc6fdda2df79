//! Fills the disk of a template that is being built, within its builder. See `warren::mason`.

use std::process::ExitCode;

fn main() -> ExitCode {
    warren::mason::main()
}
