use crate::sandbox::ledger::{Account, Resource};

/// Whatever the database holds for an account: what is read as one is written as it was read, and comes back whole.
pub fn ledger(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Some(mut account) = Account::parse(text) else { return };
    assert!(account.entries().len() <= Resource::ALL.len());
    assert_eq!(Account::parse(&account.to_text()), Some(account.clone()));
    account.give_back(Resource::ALL);
    account.given_back(Resource::ALL, true);
    assert!(account.is_settled());
}
