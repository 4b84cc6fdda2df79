use crate::sentinel::http::response::{read, read_head, whole};

/// Any octets are a response within its bounds or an error.
pub fn http_response(data: &[u8]) {
    let _ = read_head(&mut &data[..]);
    let response = read(&mut &data[..], 100);
    // In place it is the same response.
    assert_eq!(whole(data.to_vec(), 100).ok(), response.as_ref().ok().cloned());
    if let Ok(response) = response {
        assert!(response.body.len() <= 100);
        assert!((200..600).contains(&response.status) || response.status < 200);
    }
}
