//! Whose message is whose: the bridge's rules, without any descriptor.
//!
//! A client's tag `T` is `N.T` on the port, where N is the client's number, never used again. A request is known
//! from its line to its final answer. Messages for the port wait in their client's own queue and are taken in turn,
//! so that one client's upload does not hold up another's question.

use std::collections::{BTreeMap, HashMap, VecDeque};

use crate::wire::{Code, Decoded, Error, FRAME, MAX_LINE, MAX_TAG, Message, Request};

/// Octets that may wait for the port before a client is not read any more.
const MAX_WAITING: usize = 256 * 1024;
/// Requests that one client may have under way.
const MAX_REQUESTS: usize = 1024;

/// What the node said about the port itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Greeting {
    /// The answer, as it travels.
    pub answer: Vec<u8>,
    /// A new supervisor: what waits in the port's buffer was for its predecessor and must not follow the answer.
    pub is_new: bool,
}

#[derive(Debug)]
struct Pending {
    /// `None` once its client has gone or was told the end already: answers are dropped.
    owner: Option<(u64, String)>,
    /// Whether the node may know of it.
    sent: bool,
}

#[derive(Debug, Default)]
struct Client {
    /// Port tags by the client's tags.
    tags: HashMap<String, String>,
    waiting: VecDeque<Waiting>,
    octets: usize,
    /// Names requests whose tag is too long to be given a prefix.
    long_tags: u64,
}

#[derive(Debug)]
struct Waiting {
    port_tag: String,
    is_request: bool,
    octets: Vec<u8>,
}

/// The state of all requests that cross the bridge.
#[derive(Debug, Default)]
pub struct Relay {
    clients: BTreeMap<u64, Client>,
    last_client: u64,
    /// The client that was served last.
    turn: u64,
    requests: HashMap<String, Pending>,
    cancels: VecDeque<Vec<u8>>,
    replies: Vec<(u64, Message)>,
    session: Option<Vec<u8>>,
}

impl Relay {
    /// A bridge without clients, before the node's first greeting.
    pub fn new() -> Self {
        Self::default()
    }

    /// A new client; gives its number.
    pub fn connected(&mut self) -> u64 {
        self.last_client += 1;
        self.clients.insert(self.last_client, Client::default());
        self.last_client
    }

    /// A client has gone: what it asked for is cancelled at the node, and what the node has not seen is dropped.
    pub fn gone(&mut self, id: u64) {
        let Some(client) = self.clients.remove(&id) else { return };
        for port_tag in client.tags.into_values() {
            self.disown(&port_tag);
        }
    }

    /// Whether more of this client should be read now.
    pub fn accepts(&self, id: u64) -> bool {
        self.clients.get(&id).is_some_and(|client| client.octets < MAX_WAITING)
    }

    /// Whether this client waits for no answer.
    pub fn is_idle(&self, id: u64) -> bool {
        self.clients.get(&id).is_none_or(|client| client.tags.is_empty())
    }

    /// Answers for clients, in order.
    pub fn take_replies(&mut self) -> Vec<(u64, Message)> {
        std::mem::take(&mut self.replies)
    }

    /// Takes in what a client sent.
    pub fn take_from_client(&mut self, id: u64, found: Decoded) {
        match found {
            Decoded::Bad { tag, error } => self.refuse(id, tag, error),
            Decoded::Message(Message::Request(request)) => self.take_request(id, request),
            Decoded::Message(Message::Data { tag, channel, payload }) => {
                let Some(port_tag) = self.port_tag(id, &tag) else { return };
                if payload.is_empty() {
                    self.queue(id, &port_tag, Message::data(&port_tag, &channel, payload));
                    return;
                }
                for frame in payload.chunks(FRAME) {
                    self.queue(id, &port_tag, Message::data(&port_tag, &channel, frame));
                }
            }
            Decoded::Message(mut message @ (Message::Cancel { .. } | Message::End { .. } | Message::Credit { .. })) => {
                let Some(port_tag) = self.port_tag(id, message.tag()) else { return };
                message.retag(&port_tag);
                self.queue(id, &port_tag, message);
            }
            Decoded::Message(message) => {
                let error = Error::new(Code::BadLine, "ok, err and item are the node's words, not a client's");
                self.refuse(id, message.tag().to_string(), error);
            }
        }
    }

    fn take_request(&mut self, id: u64, mut request: Request) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let tag = request.tag.clone();
        let answer = |error: Error| (id, Message::err(&tag, error));
        if client.tags.contains_key(&tag) {
            // Its first request goes on: only this line is refused.
            let error = Error::new(Code::TagInUse, format!("tag {tag} is in use by a request under way"));
            self.replies.push(answer(error));
            return;
        }
        if client.tags.len() >= MAX_REQUESTS {
            let error = Error::new(Code::TooManyRequests, format!("{MAX_REQUESTS} requests are under way"))
                .with("max", MAX_REQUESTS);
            self.replies.push(answer(error));
            return;
        }
        let mut port_tag = format!("{id}.{tag}");
        if port_tag.len() > MAX_TAG {
            client.long_tags += 1;
            // No client's tag can look so after its prefix: that ends in a full stop.
            port_tag = format!("{id}/{}", client.long_tags);
        }
        request.tag.clone_from(&port_tag);
        let octets = Message::Request(request).to_bytes();
        if octets.len() > MAX_LINE {
            let error = Error::new(Code::LineTooLong, format!("line is over the limit of {MAX_LINE} octets"))
                .with("max", MAX_LINE);
            self.replies.push(answer(error));
            return;
        }
        client.tags.insert(tag.clone(), port_tag.clone());
        client.octets += octets.len();
        client.waiting.push_back(Waiting { port_tag: port_tag.clone(), is_request: true, octets });
        self.requests.insert(port_tag, Pending { owner: Some((id, tag)), sent: false });
    }

    /// Takes in what the node sent. Gives its greeting where it is one: the caller sends the answer.
    pub fn take_from_port(&mut self, found: Decoded) -> Option<Greeting> {
        let mut message = match found {
            Decoded::Message(message) => message,
            Decoded::Bad { error, .. } => {
                super::note(&format!("the port sent a bad line: {}", error.message));
                return None;
            }
        };
        if message.tag() == "-" {
            match &message {
                Message::Err { error, .. } => super::note(&format!("the node could not read a line: {error}")),
                _ => return session_of(&message).map(|session| self.greeted(session)),
            }
            return None;
        }
        let port_tag = message.tag().to_string();
        let pending = self.requests.get_mut(&port_tag)?;
        if let Some((id, tag)) = pending.owner.clone() {
            let is_final = message.is_final();
            message.retag(&tag);
            self.replies.push((id, message));
            if is_final {
                self.requests.remove(&port_tag);
                self.forget_tag(id, &tag);
            }
        } else if message.is_final() {
            self.requests.remove(&port_tag);
        }
        None
    }

    fn greeted(&mut self, session: Vec<u8>) -> Greeting {
        let is_new = self.session.as_ref() != Some(&session);
        if is_new {
            if self.session.is_some() {
                super::note("the node's supervisor was restarted");
            }
            self.cancels.clear();
            self.fail(|pending| pending.sent, Code::NodeRestarted, "the node's supervisor was restarted meanwhile");
        }
        // The LF ends what may have been cut in transit.
        let mut answer = b"\n".to_vec();
        Message::Request(Request::new("-", "port.sync").set_bytes("session", &session)).encode(&mut answer);
        self.session = Some(session);
        Greeting { answer, is_new }
    }

    /// The port has gone: every request fails, and nothing is sent before the next greeting.
    pub fn port_lost(&mut self) {
        self.session = None;
        self.cancels.clear();
        self.fail(|_| true, Code::LinkLost, "the node's port was closed");
        for client in self.clients.values_mut() {
            client.waiting.clear();
            client.octets = 0;
        }
    }

    /// Whether `next_for_port` has something.
    pub fn has_for_port(&self) -> bool {
        self.session.is_some()
            && (!self.cancels.is_empty() || self.clients.values().any(|client| !client.waiting.is_empty()))
    }

    /// The next whole message for the port: cancels first, then clients in turn. Nothing before the first greeting.
    pub fn next_for_port(&mut self) -> Option<Vec<u8>> {
        self.session.as_ref()?;
        if let Some(cancel) = self.cancels.pop_front() {
            return Some(cancel);
        }
        loop {
            let turn = self.turn;
            let has_more = |(_, client): &(&u64, &mut Client)| !client.waiting.is_empty();
            let (after, upto) = ((turn + 1).., ..=turn);
            let id = match self.clients.range_mut(after).find(has_more) {
                Some((&id, _)) => id,
                None => *self.clients.range_mut(upto).find(has_more)?.0,
            };
            self.turn = id;
            let client = self.clients.get_mut(&id)?;
            let waiting = client.waiting.pop_front()?;
            client.octets -= waiting.octets.len();
            // What followed a request that has failed meanwhile is of no use to the node.
            let Some(pending) = self.requests.get_mut(&waiting.port_tag) else { continue };
            if pending.owner.is_none() {
                continue;
            }
            pending.sent |= waiting.is_request;
            return Some(waiting.octets);
        }
    }

    fn port_tag(&self, id: u64, tag: &str) -> Option<String> {
        self.clients.get(&id)?.tags.get(tag).cloned()
    }

    fn queue(&mut self, id: u64, port_tag: &str, message: Message) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        let octets = message.to_bytes();
        client.octets += octets.len();
        client.waiting.push_back(Waiting { port_tag: port_tag.to_string(), is_request: false, octets });
    }

    /// Answers a line that the node must not see. Where its tag is that of a request, the answer ends it for the
    /// client, so the node must end it too.
    fn refuse(&mut self, id: u64, tag: String, error: Error) {
        let Some(client) = self.clients.get_mut(&id) else { return };
        if let Some(port_tag) = client.tags.remove(&tag) {
            self.disown(&port_tag);
        }
        self.replies.push((id, Message::err(&tag, error)));
    }

    /// Nobody waits for this request any more.
    fn disown(&mut self, port_tag: &str) {
        let Some(pending) = self.requests.get_mut(port_tag) else { return };
        if pending.sent {
            pending.owner = None;
            self.cancels.push_back(Message::Cancel { tag: port_tag.to_string() }.to_bytes());
        } else {
            self.requests.remove(port_tag);
        }
    }

    fn forget_tag(&mut self, id: u64, tag: &str) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.tags.remove(tag);
        }
    }

    fn fail(&mut self, which: impl Fn(&Pending) -> bool, code: Code, sentence: &str) {
        let failed: Vec<String> =
            self.requests.iter().filter(|(_, pending)| which(pending)).map(|(tag, _)| tag.clone()).collect();
        for port_tag in failed {
            if let Some(Pending { owner: Some((id, tag)), .. }) = self.requests.remove(&port_tag) {
                self.replies.push((id, Message::err(&tag, Error::new(code, sentence))));
                self.forget_tag(id, &tag);
            }
        }
    }
}

/// The session that a greeting (`- item event=port session=…`) names.
pub fn session_of(message: &Message) -> Option<Vec<u8>> {
    match message {
        Message::Item { tag, fields } if tag == "-" && fields.get("event") == Some("port") => {
            fields.bytes("session").filter(|session| !session.is_empty()).map(<[u8]>::to_vec)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{Decoder, Fields, MAX_DATA};

    fn say(relay: &mut Relay, id: u64, octets: &[u8]) {
        let mut decoder = Decoder::new();
        decoder.push(octets);
        while let Some(found) = decoder.next() {
            relay.take_from_client(id, found);
        }
    }

    fn answer(relay: &mut Relay, octets: &[u8]) -> Vec<Greeting> {
        let mut decoder = Decoder::new();
        decoder.push(octets);
        std::iter::from_fn(|| decoder.next()).filter_map(|found| relay.take_from_port(found)).collect()
    }

    fn sent(relay: &mut Relay) -> Vec<String> {
        std::iter::from_fn(|| relay.next_for_port()).map(|m| String::from_utf8_lossy(&m).into_owned()).collect()
    }

    fn replies(relay: &mut Relay) -> Vec<(u64, String)> {
        let text = |m: Message| String::from_utf8_lossy(&m.to_bytes()).into_owned();
        relay.take_replies().into_iter().map(|(id, message)| (id, text(message))).collect()
    }

    fn synced() -> Relay {
        let mut relay = Relay::new();
        answer(&mut relay, b"- item event=port session=s1\n");
        relay
    }

    #[test]
    fn nothing_is_sent_before_the_greeting_and_all_of_it_after() {
        let mut relay = Relay::new();
        let id = relay.connected();
        say(&mut relay, id, b"1 hello\n");
        assert!(relay.next_for_port().is_none());
        let greetings = answer(&mut relay, b"- item event=port session=s1\n");
        assert_eq!(greetings, [Greeting { answer: b"\n- port.sync session=s1\n".to_vec(), is_new: true }]);
        assert_eq!(sent(&mut relay), ["1.1 hello\n"]);
    }

    #[test]
    fn two_clients_with_the_same_tag_get_their_own_answers() {
        let mut relay = synced();
        let (a, b) = (relay.connected(), relay.connected());
        say(&mut relay, a, b"x one\n");
        say(&mut relay, b, b"x two\n");
        assert_eq!(sent(&mut relay), ["1.x one\n", "2.x two\n"]);
        answer(&mut relay, b"2.x item n=1\n1.x ok\n2.x ok\n1.x ok\n");
        let wanted = [(b, "x item n=1\n"), (a, "x ok\n"), (b, "x ok\n")];
        assert_eq!(replies(&mut relay), wanted.map(|(id, text)| (id, text.to_string())));
        assert!(relay.is_idle(a) && relay.is_idle(b));
    }

    #[test]
    fn clients_take_turns() {
        let mut relay = synced();
        let (a, b) = (relay.connected(), relay.connected());
        say(&mut relay, a, b"1 p\n2 p\n3 p\n");
        say(&mut relay, b, b"1 q\n");
        assert_eq!(sent(&mut relay), ["1.1 p\n", "2.1 q\n", "1.2 p\n", "1.3 p\n"]);
    }

    #[test]
    fn large_data_is_cut_into_frames_for_the_port() {
        let mut relay = synced();
        let id = relay.connected();
        say(&mut relay, id, b"1 file.write\n");
        relay.take_from_client(id, Decoded::Message(Message::data("1", "content", vec![7; MAX_DATA])));
        assert!(!relay.accepts(id));
        let mut octets = 0;
        while let Some(message) = relay.next_for_port() {
            assert!(message.len() <= 32 * 1024);
            octets += message.len();
        }
        assert!(octets > MAX_DATA);
        assert!(relay.accepts(id));
    }

    #[test]
    fn a_vanished_clients_requests_are_cancelled_and_their_answers_dropped() {
        let mut relay = synced();
        let id = relay.connected();
        say(&mut relay, id, b"1 exec.start a b\n");
        assert_eq!(sent(&mut relay).len(), 1);
        say(&mut relay, id, b"2 never.sent\n");
        relay.gone(id);
        assert_eq!(sent(&mut relay), ["1.1 cancel\n"]);
        answer(&mut relay, b"1.1 err CANCELLED \"x\"\n");
        assert!(replies(&mut relay).is_empty());
        assert!(relay.requests.is_empty());
    }

    #[test]
    fn a_new_session_fails_what_the_old_one_knew_and_keeps_what_it_did_not() {
        let mut relay = synced();
        let id = relay.connected();
        say(&mut relay, id, b"1 a\n");
        relay.next_for_port();
        say(&mut relay, id, b"1 data stdin 1\nx\n2 b\n");
        let greetings = answer(&mut relay, b"- item event=port session=s2\n");
        assert!(greetings[0].is_new);
        let told = replies(&mut relay);
        assert_eq!(told.len(), 1);
        assert!(told[0].1.starts_with("1 err NODE_RESTARTED "), "{told:?}");
        assert_eq!(sent(&mut relay), ["1.2 b\n"]);
        assert!(!answer(&mut relay, b"- item event=port session=s2\n")[0].is_new);
        assert!(replies(&mut relay).is_empty());
    }

    #[test]
    fn garbage_is_answered_here_and_ends_the_request_whose_tag_it_bears() {
        let mut relay = synced();
        let (a, b) = (relay.connected(), relay.connected());
        say(&mut relay, b, b"1 b\n");
        say(&mut relay, a, b"\xff\xfe\n5 x \"\n5 ok\n");
        assert_eq!(sent(&mut relay), ["2.1 b\n"]);
        let told: Vec<String> = replies(&mut relay).into_iter().map(|(_, text)| text[..13].to_string()).collect();
        assert_eq!(told, ["- err BAD_LIN", "5 err BAD_LIN", "5 err BAD_LIN"]);
        say(&mut relay, a, b"1 exec.start\n");
        sent(&mut relay);
        say(&mut relay, a, b"1 data stdin 99999999\n");
        assert_eq!(sent(&mut relay), ["1.1 cancel\n"]);
        assert!(replies(&mut relay)[0].1.starts_with("1 err DATA_TOO_LONG"));
        answer(&mut relay, b"1.1 ok\n");
        assert!(replies(&mut relay).is_empty());
    }

    #[test]
    fn a_tag_in_use_is_refused_and_its_first_request_goes_on() {
        let mut relay = synced();
        let id = relay.connected();
        say(&mut relay, id, b"1 a\n1 b\n");
        assert_eq!(sent(&mut relay), ["1.1 a\n"]);
        assert!(replies(&mut relay)[0].1.starts_with("1 err TAG_IN_USE"));
        answer(&mut relay, b"1.1 ok\n");
        assert_eq!(replies(&mut relay), [(id, "1 ok\n".to_string())]);
    }

    #[test]
    fn the_longest_tag_passes() {
        let mut relay = synced();
        let id = relay.connected();
        let tag = "t".repeat(MAX_TAG);
        say(&mut relay, id, format!("{tag} hello\n{tag} cancel\n").as_bytes());
        assert_eq!(sent(&mut relay), ["1/1 hello\n", "1/1 cancel\n"]);
        answer(&mut relay, b"1/1 ok\n");
        assert_eq!(replies(&mut relay), [(id, format!("{tag} ok\n"))]);
    }

    #[test]
    fn a_lost_port_fails_everything() {
        let mut relay = synced();
        let id = relay.connected();
        say(&mut relay, id, b"1 a\n");
        sent(&mut relay);
        say(&mut relay, id, b"2 b\n");
        relay.port_lost();
        assert_eq!(replies(&mut relay).len(), 2);
        assert!(relay.next_for_port().is_none() && relay.is_idle(id));
    }

    #[test]
    fn only_a_whole_greeting_is_one() {
        let item = |fields: Fields| session_of(&Message::item("-", fields));
        assert_eq!(item(Fields::new().with("event", "port").with("session", "x")), Some(b"x".to_vec()));
        assert_eq!(item(Fields::new().with("event", "port")), None);
        assert_eq!(item(Fields::new().with("event", "other").with("session", "x")), None);
    }
}
