use crate::sentinel::collectors::modbus::frame::{Answer, Ask, Framing, Table, answer};

/// Whatever a device sends, every answer takes something off the front, and data is as much as was asked for.
pub fn modbus(data: &[u8]) {
    for framing in [Framing::Tcp, Framing::Rtu] {
        for (table, count) in [(Table::Holding, 3), (Table::Coil, 9)] {
            let ask = Ask { table, address: 0, count };
            let mut buffer = data.to_vec();
            loop {
                let before = buffer.len();
                match answer(&mut buffer, framing, 1, 1, &ask) {
                    Ok(Some(Answer::Data(values))) => assert_eq!(values.len(), if count == 3 { 6 } else { 2 }),
                    Ok(Some(_)) => {}
                    Ok(None) | Err(_) => break,
                }
                assert!(buffer.len() < before);
            }
        }
    }
}
