//! From a list of system calls to the kernel's filter (seccomp(2)).

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::lists::{CALLS, Kind, REQUESTS, Rule, allows};

/// What becomes of a worker that makes a call outside of its list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Breach {
    /// The kernel kills the whole process, at once and without a word.
    Kill,
    /// It gets SIGSYS, whose handler leaves the call's number in the last words: for who looks for a call that a list
    /// lacks. A hostile program would have its way with the handler, so the supervisor never asks for this.
    Explain,
}

/// The filter of a list.
pub fn compile(kind: Kind, breach: Breach) -> Result<BpfProgram, seccompiler::Error> {
    let equal =
        |argument: u8, value: u64| SeccompCondition::new(argument, SeccompCmpArgLen::Dword, SeccompCmpOp::Eq, value);
    let mut calls = BTreeMap::new();
    for call in CALLS.iter().filter(|call| allows(call.kinds, kind)) {
        let rules = match call.rule {
            Rule::Any => Vec::new(),
            Rule::Requests => REQUESTS
                .iter()
                .filter(|request| allows(request.kinds, kind))
                .map(|request| SeccompRule::new(vec![equal(1, request.number)?]))
                .collect::<Result<_, _>>()?,
            Rule::Without(argument, bits, _) => {
                let none = SeccompCmpOp::MaskedEq(bits);
                let condition = SeccompCondition::new(argument, SeccompCmpArgLen::Dword, none, 0)?;
                vec![SeccompRule::new(vec![condition])?]
            }
            Rule::OneOf(argument, values) => values
                .iter()
                .map(|(value, _)| SeccompRule::new(vec![equal(argument, *value)?]))
                .collect::<Result<_, _>>()?,
            Rule::All(values, _) => {
                let conditions = values.iter().map(|(argument, value)| equal(*argument, *value));
                vec![SeccompRule::new(conditions.collect::<Result<_, _>>()?)?]
            }
        };
        calls.insert(call.number, rules);
    }
    let refused = match breach {
        Breach::Kill => SeccompAction::KillProcess,
        Breach::Explain => SeccompAction::Trap,
    };
    let filter = SeccompFilter::new(calls, refused, SeccompAction::Allow, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}

/// Puts a list in force on the calling thread, for good.
pub fn apply(kind: Kind, breach: Breach) -> io::Result<()> {
    let program = compile(kind, breach).map_err(io::Error::other)?;
    seccompiler::apply_filter(&program).map_err(io::Error::other)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_list_becomes_a_filter() {
        for kind in Kind::ALL {
            let program = compile(kind, Breach::Kill).unwrap();
            assert!(program.len() > 30, "{kind:?}: {}", program.len());
        }
    }
}
