//! Links what is shipped without the tables of how to unwind the stack, a fifteenth of the program: it aborts on a panic, and
//! nothing else would read them. Programs of other profiles keep them, for debuggers.

use std::env;

/// Functions of the C library that the standard library refers to weakly, as they may be missing. Weak references alone do not
/// bring them into a static program, and link-time optimization may make weak those of others to the same function, which
/// then call address 0: so they are asked for.
const REFERRED_TO_WEAKLY: [&str; 6] = [
    "copy_file_range",
    "getrandom",
    "gnu_get_libc_version",
    "posix_spawn_file_actions_addchdir_np",
    "preadv2",
    "statx",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-changed=no-unwind-tables.ld");
    for function in REFERRED_TO_WEAKLY {
        println!("cargo::rustc-link-arg-bins=-Wl,-u,{function}");
    }
    if env::var("PROFILE").is_ok_and(|profile| profile == "release") {
        let directory = env::var("CARGO_MANIFEST_DIR").unwrap_or_default();
        println!("cargo::rustc-link-arg-bins=-Wl,--no-eh-frame-hdr");
        println!("cargo::rustc-link-arg-bins=-Wl,-T,{directory}/no-unwind-tables.ld");
    }
}
