//! `template`: what there is, what becomes of it, and how one is built.

mod build;
mod context;
mod source;

use std::io::{self, IsTerminal};
use std::path::Path;

use super::args::TemplateVerb;
use super::client::{Client, LOCAL_IO, local};
use super::output::{json_object, print, print_json};
use super::show::text;
use super::{Cli, Failure, backup, show, snapshot};
use crate::wire::{Error, Fields, Request};

/// `warren template VERB`.
pub fn template(cli: &Cli, connect: &dyn Fn() -> Result<Client, Error>, verb: &TemplateVerb) -> Result<u8, Failure> {
    let json = cli.json;
    match verb {
        TemplateVerb::Ls => show::templates(&mut connect()?, json),
        TemplateVerb::Inspect { names } => show::inspect(&mut connect()?, "template.inspect", names),
        TemplateVerb::Snapshot { name, vcpus, memory, network } => {
            snapshot::template(&mut connect()?, name, *vcpus, *memory, *network, json)
        }
        TemplateVerb::Build(args) => build::build(connect, args, json),
        TemplateVerb::Tag { name, new } => {
            let reply = connect()?.call(Request::new("", "template.tag").arg(name).set("name", new))?;
            show_name(&reply.fields, json)
        }
        TemplateVerb::Rm { names } => remove(&mut connect()?, names, json),
        TemplateVerb::Export { name, file } => {
            if file == Path::new("-") && io::stdout().is_terminal() {
                return Err(local(LOCAL_IO, "a template is nothing for a terminal: name a file").into());
            }
            backup::fetch(&mut connect()?, Request::new("", "template.export").arg(name), file)
        }
        TemplateVerb::Import { file, name } => {
            let request = Request::new("", "template.import");
            let request = name.iter().fold(request, |request, name| request.set("name", name));
            let mut from = backup::source(file)?;
            let reply = connect()?.transfer(request, Some(("content", &mut *from)), &mut |_, _| Ok(()))?;
            show_name(&reply.fields, json)
        }
    }
}

fn remove(client: &mut Client, names: &[String], json: bool) -> Result<u8, Failure> {
    for name in names {
        let reply = client.call(Request::new("", "template.remove").arg(name))?;
        show_name(&reply.fields, json)?;
    }
    Ok(0)
}

fn show_name(fields: &Fields, json: bool) -> Result<u8, Failure> {
    match json {
        true => print_json(&json_object(fields))?,
        false => print(format!("{}\n", text(fields, "name")))?,
    }
    Ok(0)
}
