//! Boots a node as the tests do and runs lines of standard input on it, as root: for looking around.
//!
//!     cargo run -p qemu-tests --example node -- [KERNEL-PARAMETER…]
//!
//! The control socket is printed; `warren --socket` takes it from another terminal. End of input powers off.

use std::io::BufRead;

use qemu_tests::node::Boot;

fn main() {
    let node = std::env::args().skip(1).fold(Boot::kernel(), |boot, parameter| boot.parameter(&parameter)).start();
    println!("control socket: {}", node.socket().display());
    println!("console: {}", node.machine().dir().join("console").display());
    for line in std::io::stdin().lock().lines().map_while(Result::ok) {
        let output = node.run(&["sh", "-c", &line]);
        print!("{}{}", output.stdout, output.stderr);
        println!("[{}]", output.exit);
    }
    node.power_off();
}
