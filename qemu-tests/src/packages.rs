//! Packages that tests make, and an index of them: files for the web server of `internet`.

use std::io::Write;
use std::process::{Command, Stdio};

use sha2::{Digest, Sha256, Sha512};
use warren::archive::{Entry, pack};

use crate::node::Node;

/// Where the web server of `internet` has its files.
pub const INDEX: &str = "/run/index";
/// Its private address by a name that only the node knows.
pub const URL: &str = "http://mirror.test:8000";
/// Its private address.
pub const MIRROR: &str = "10.0.0.5";

fn hex(octets: &[u8]) -> String {
    octets.iter().map(|octet| format!("{octet:02x}")).collect()
}

/// As zip has it (APPNOTE.TXT 4.4.7): reflected, polynomial 0xEDB88320.
fn crc32(octets: &[u8]) -> u32 {
    !octets.iter().fold(u32::MAX, |crc, octet| {
        (0..8).fold(crc ^ u32::from(*octet), |crc, _| if crc & 1 == 1 { (crc >> 1) ^ 0xEDB8_8320 } else { crc >> 1 })
    })
}

/// A zip archive whose files are stored as they are.
fn zip(files: &[(String, String)]) -> Vec<u8> {
    let (mut archive, mut central) = (Vec::new(), Vec::new());
    let length = |octets: usize| u32::try_from(octets).expect("tests' files are small").to_le_bytes();
    for (name, content) in files {
        let at = length(archive.len());
        let (name, content) = (name.as_bytes(), content.as_bytes());
        let name_length = u16::try_from(name.len()).expect("a name is short").to_le_bytes();
        // Version, flags, method, time and date: the first day of 1980.
        let common = [&[20, 0, 0, 0, 0, 0, 0, 0, 0x21, 0][..], &crc32(content).to_le_bytes(), &length(content.len())];
        let common = [&common.concat()[..], &length(content.len()), &name_length, &[0, 0]].concat();
        archive.extend([b"PK\x03\x04", &common[..], name, content].concat());
        central.extend([b"PK\x01\x02\x14\x03", &common[..], &[0; 6], &[0, 0, 0xA4, 0x81], &at, name].concat());
    }
    let count = u16::try_from(files.len()).expect("tests' files are few").to_le_bytes();
    let end = [&length(central.len())[..], &length(archive.len()), &[0, 0]].concat();
    [&archive[..], &central, b"PK\x05\x06\0\0\0\0", &count, &count, &end].concat()
}

/// Puts a wheel on the index: one module, and what it requires. `broken`: the index says another digest.
pub fn put_wheel(node: &Node, (name, version): (&str, &str), requires: &[&str], module: &str, broken: bool) {
    let info = format!("{name}-{version}.dist-info");
    let requires: String = requires.iter().map(|name| format!("Requires-Dist: {name}\n")).collect();
    let wheel = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n";
    let mut files = vec![
        (format!("{name}/__init__.py"), module.to_string()),
        (format!("{info}/METADATA"), format!("Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{requires}")),
        (format!("{info}/WHEEL"), wheel.to_string()),
    ];
    let record: String = files.iter().map(|(name, _)| format!("{name},,\n")).collect();
    files.push((format!("{info}/RECORD"), format!("{record}{info}/RECORD,,\n")));
    let wheel = zip(&files);
    let digest = if broken { "0".repeat(64) } else { hex(&Sha256::digest(&wheel)) };
    let file = format!("{name}-{version}-py3-none-any.whl");
    let page =
        format!("<!DOCTYPE html><html><body><a href=\"/pip-files/{file}#sha256={digest}\">{file}</a></body></html>");
    node.sh(&format!("mkdir -p {INDEX}/pip/{name} {INDEX}/pip-files"));
    node.write_file(&format!("{INDEX}/pip-files/{file}"), 0o644, &wheel);
    node.write_file(&format!("{INDEX}/pip/{name}/index.html"), 0o644, page.as_bytes());
}

fn base64(octets: &[u8]) -> String {
    const LETTERS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::new();
    for chunk in octets.chunks(3) {
        let bits = chunk.iter().fold(0u32, |bits, octet| bits << 8 | u32::from(*octet)) << (8 * (3 - chunk.len()));
        for at in 0..4 {
            let letter = LETTERS[(bits >> (18 - 6 * at)) as usize & 63];
            text.push(if at > chunk.len() { '=' } else { char::from(letter) });
        }
    }
    text
}

/// A version of a package for the registry: its files, and what it requires.
#[derive(Debug)]
pub struct Release<'a> {
    /// Its number.
    pub version: &'a str,
    /// `package.json` beside name, version and dependencies, as members of an object.
    pub manifest: &'a str,
    /// Paths and contents.
    pub files: &'a [(&'a str, &'a str)],
    /// Names and ranges.
    pub requires: &'a [(&'a str, &'a str)],
}

/// Puts a package on the registry. `broken`: the registry says other digests.
pub fn put_npm(node: &Node, name: &str, releases: &[Release], broken: bool) {
    let encoded = name.replace('/', "%2f");
    node.sh(&format!("mkdir -p {INDEX}/npm {INDEX}/npm-files"));
    let mut versions = serde_json::Map::new();
    for Release { version, manifest, files, requires } in releases {
        let dependencies: serde_json::Map<String, serde_json::Value> =
            requires.iter().map(|(name, range)| ((*name).to_string(), (*range).into())).collect();
        let mut own: serde_json::Value = serde_json::from_str(&format!("{{{manifest}}}")).expect("JSON");
        own["name"] = name.into();
        own["version"] = (*version).into();
        own["dependencies"] = dependencies.into();
        let text = own.to_string();
        let all: Vec<(&str, &str)> =
            [("package.json", text.as_str())].into_iter().chain(files.iter().copied()).collect();
        let entry =
            |path: &str| Entry { path: format!("package/{path}").into_bytes(), mode: 0o644, ..Entry::default() };
        let archive =
            gzip(&pack(&all.iter().map(|(path, content)| (entry(path), content.as_bytes())).collect::<Vec<_>>()));
        let digest = if broken { vec![0; 64] } else { Sha512::digest(&archive).to_vec() };
        let file = format!("{}-{version}.tgz", encoded.replace("%2f", "-"));
        node.write_file(&format!("{INDEX}/npm-files/{file}"), 0o644, &archive);
        own["dist"] = serde_json::json!({
            "tarball": format!("{URL}/npm-files/{file}"),
            "integrity": format!("sha512-{}", base64(&digest)),
        });
        versions.insert((*version).to_string(), own);
    }
    let latest = releases.last().expect("a package has a version").version;
    let document = serde_json::json!({ "name": name, "dist-tags": { "latest": latest }, "versions": versions });
    node.write_file(&format!("{INDEX}/npm/{encoded}"), 0o644, document.to_string().as_bytes());
}

fn gzip(octets: &[u8]) -> Vec<u8> {
    let mut gzip = Command::new("gzip").arg("-n").stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("gzip");
    let mut input = gzip.stdin.take().expect("a pipe");
    let content = octets.to_vec();
    let writer = std::thread::spawn(move || input.write_all(&content));
    let output = gzip.wait_with_output().expect("it ends");
    writer.join().expect("the thread ends").expect("gzip reads");
    output.stdout
}
