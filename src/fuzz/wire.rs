use crate::wire::{Decoded, Decoder, Message};

fn decode(parts: &[&[u8]]) -> Vec<Decoded> {
    let mut decoder = Decoder::new();
    let mut all = Vec::new();
    for part in parts {
        decoder.push(part);
        while let Some(decoded) = decoder.next() {
            all.push(decoded);
        }
    }
    all
}

/// However the stream is cut, the same messages come out; and a message survives the way out and back.
pub fn wire(data: &[u8]) {
    let whole = decode(&[data]);
    let cut = data.first().map_or(0, |&octet| usize::from(octet) % data.len());
    let (head, tail) = data.split_at(cut);
    assert_eq!(decode(&[head, tail]), whole);
    let messages: Vec<Message> = whole
        .into_iter()
        .filter_map(|decoded| match decoded {
            Decoded::Message(message) => Some(message),
            Decoded::Bad { .. } => None,
        })
        .collect();
    let mut again = Vec::new();
    for message in &messages {
        again.clear();
        message.encode(&mut again);
        // Escapes may make a line longer than it was, even too long.
        if again.len() < crate::wire::MAX_LINE {
            assert_eq!(decode(&[&again]), [Decoded::Message(message.clone())]);
        }
    }
}
