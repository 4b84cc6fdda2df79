//! The golden transcripts of docs/protocol.md, against the real node.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

use qemu_tests::transcript::{self, Memory, Step};
use qemu_tests::{Request, shared, timing};

/// Replays one transcript over a connection of its own.
fn replay(socket: &std::path::Path, transcript: &transcript::Transcript) -> Result<(), String> {
    let mut stream = UnixStream::connect(socket).map_err(|e| e.to_string())?;
    stream.set_read_timeout(Some(timing::hang())).map_err(|e| e.to_string())?;
    let mut lines = BufReader::new(stream.try_clone().map_err(|e| e.to_string())?);
    let mut memory = Memory::default();
    let mut skip = false;
    for (number, step) in transcript.steps.iter().enumerate() {
        match step {
            Step::Skip => skip = true,
            Step::Send(line) => {
                stream.write_all(format!("{}\n", memory.fill(line)).as_bytes()).map_err(|e| e.to_string())?;
            }
            Step::Expect(expected) => loop {
                let mut line = String::new();
                let read = lines.read_line(&mut line);
                let line = line.trim_end_matches('\n');
                match read {
                    Ok(n) if n > 0 => {}
                    other => return Err(format!("step {number}: {expected:?} did not come ({other:?})")),
                }
                if memory.matches(expected, line) {
                    skip = false;
                    break;
                }
                if !skip {
                    return Err(format!("step {number}:\nexpected {}\ncame     {line}", memory.fill(expected)));
                }
            },
        }
    }
    Ok(())
}

#[test]
fn every_transcript_of_the_protocol_page_is_true() {
    let page = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/protocol.md");
    let text = std::fs::read_to_string(page).expect("docs/protocol.md is part of the tree");
    let transcripts = transcript::parse(&text);
    assert!(!transcripts.is_empty(), "docs/protocol.md has no transcripts");
    let node = shared::node();
    let failures: Vec<String> = transcripts
        .iter()
        .filter_map(|transcript| {
            replay(&node.socket(), transcript).err().map(|why| format!("{}: {why}", transcript.name))
        })
        .collect();
    assert!(failures.is_empty(), "{} of {} differ:\n{}", failures.len(), transcripts.len(), failures.join("\n"));
}

#[test]
fn a_port_that_goes_and_comes_back_is_opened_again() {
    let node = shared::node();
    let monitor = |command: &str, arguments| node.machine().monitor(command, arguments).expect("QEMU does it");
    monitor("device_del", serde_json::json!({"id": "control-port"}));
    let gone = || node.run(&["test", "-e", "/dev/virtio-ports/org.warren.control.0"]).exit != 0;
    timing::wait_for("the port to be gone", || gone().then_some(()));
    let port = serde_json::json!({"driver": "virtserialport", "id": "control-port", "chardev": "control", "name": "org.warren.control.0"});
    timing::wait_for("QEMU to take it", || node.machine().monitor("device_add", port.clone()).ok());
    let hello = || node.connect().call(Request::new("", "hello")).ok();
    timing::wait_for("an answer over the port", hello);
}
