//! The one binary of a node. Its first argument names the role; anything else is the command line.

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut args = std::env::args_os().skip(1);
    let role = args.next().unwrap_or_default();
    match role.to_str() {
        _ if std::process::id() == 1 && role != "vmm" => warren::init::main(),
        Some("vmm") => warren::vmm::main(),
        Some("sentinel") => warren::sentinel::main(args.collect()),
        Some("supervise") => warren::node::main(args.collect()),
        _ => warren::cli::main(),
    }
}
