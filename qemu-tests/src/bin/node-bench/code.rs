//! Code of Python, as a client sees it.

use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use qemu_tests::bench::median;
use qemu_tests::connection::Connection;
use warren::wire::{Message, Request};

use super::{CONTROL, EXECS, ask, milliseconds, print};

const COLD: usize = 5;

/// The rows `code_run_python_ms` and `code_run_python_cold_ms`. The template has to be on its way.
pub fn measure() -> io::Result<()> {
    let mut connection = Connection::open(Path::new(CONTROL))?;
    while ask(&mut connection, Request::new("t", "template.inspect").arg("python")).is_err() {
        std::thread::sleep(Duration::from_millis(50));
    }
    let create = Request::new("c", "sandbox.create").set("template", "python").set("memory_mib", 256);
    let (_, fields) = ask(&mut connection, create)?;
    let id = fields.get("id").ok_or_else(|| io::Error::other("no id"))?.to_string();
    let run = || Request::new("r", "code.run").arg(&id);
    // Once for what the guest reads from its disk.
    once(&mut connection, run().set("language", "python"))?;
    let cold = times(&mut connection, COLD, || run().set("language", "python"))?;
    print("code_run_python_cold_ms", cold, "ms", "code.run of 1+1 with an interpreter of its own, guest cache warm");
    let context = Request::new("x", "code.context.create").arg(&id).set("language", "python");
    let (_, fields) = ask(&mut connection, context)?;
    let number = fields.get("context").ok_or_else(|| io::Error::other("no context"))?.to_string();
    once(&mut connection, run().set("context", &number))?;
    let warm = times(&mut connection, EXECS, || run().set("context", &number))?;
    print("code_run_python_ms", warm, "ms", "code.run of 1+1 in a context, request to answer");
    ask(&mut connection, Request::new("d", "sandbox.remove").arg(&id).set("force", true))?;
    Ok(())
}

fn times(connection: &mut Connection, count: usize, request: impl Fn() -> Request) -> io::Result<f64> {
    let mut times = (0..count).map(|_| once(connection, request())).collect::<io::Result<Vec<f64>>>()?;
    Ok(median(&mut times))
}

/// One run of `1+1`, in milliseconds.
fn once(connection: &mut Connection, request: Request) -> io::Result<f64> {
    let tag = request.tag.clone();
    let start = Instant::now();
    connection.send(&Message::Request(request))?;
    connection.send(&Message::data(&tag, "source", b"1+1".as_slice()))?;
    connection.send(&Message::end(&tag, "source"))?;
    let mut result = Vec::new();
    loop {
        match connection.receive()? {
            message if message.tag() != tag => {}
            Message::Data { channel, payload, .. } if channel == "result" => result.extend(payload),
            Message::Ok { .. } if result.windows(4).any(|part| part == b": \"2") => {
                return Ok(milliseconds(start.elapsed()));
            }
            Message::Ok { fields, .. } => return Err(io::Error::other(format!("1+1 gave no 2: {fields:?}"))),
            Message::Err { error, .. } => return Err(io::Error::other(format!("code.run failed: {error}"))),
            _ => {}
        }
    }
}
