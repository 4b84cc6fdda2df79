use crate::sentinel::http::response::{read, read_head};

/// Any octets are a response within its bounds or an error.
pub fn http_response(data: &[u8]) {
    let _ = read_head(&mut &data[..]);
    if let Ok(response) = read(&mut &data[..], 100) {
        assert!(response.body.len() <= 100);
        assert!((200..600).contains(&response.status) || response.status < 200);
    }
}
