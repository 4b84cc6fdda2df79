//! `hostile-guest` is a kernel, not a program: linked by a script of its own, to fixed addresses, without libc's start.

use std::path::Path;

fn main() {
    let directory = std::env::var("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
    let script = Path::new(&directory).join("src/bin/hostile-guest/link.ld");
    for argument in ["-nostartfiles", "-nostdlib", "-Wl,-no-pie", "-Wl,--build-id=none", "-Wl,-n"] {
        println!("cargo:rustc-link-arg-bin=hostile-guest={argument}");
    }
    println!("cargo:rustc-link-arg-bin=hostile-guest=-Wl,-T,{}", script.display());
    println!("cargo:rerun-if-changed={}", script.display());
    println!("cargo:rerun-if-changed=build.rs");
}
