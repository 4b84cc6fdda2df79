//! The guest agent: PID 1 of every sandbox. See `warren::guest`.

fn main() {
    warren::guest::main()
}
