//! The local terminal: raw mode that is taken back on every way out, and its size.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::{Mutex, Once, PoisonError};

use nix::sys::termios::{self, SetArg, Termios};

/// What the terminal on standard input was set to, while it is in raw mode. Here and not only in the guard, so that
/// the panic hook finds it: the program ends on a panic without running destructors.
static COOKED: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// Standard input's terminal in raw mode; dropping it sets the terminal back.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Puts the terminal on standard input into raw mode. Fails where it is not a terminal.
    pub fn enter() -> io::Result<Self> {
        HOOK.call_once(|| {
            let before = std::panic::take_hook();
            std::panic::set_hook(Box::new(move |info| {
                restore();
                before(info);
            }));
        });
        let cooked = termios::tcgetattr(io::stdin())?;
        *COOKED.lock().unwrap_or_else(PoisonError::into_inner) = Some(cooked);
        let guard = Self(());
        guard.set_raw()?;
        Ok(guard)
    }

    /// Puts the terminal into raw mode again, after a stop let the shell change it.
    pub fn set_raw(&self) -> io::Result<()> {
        let mut raw = termios::tcgetattr(io::stdin())?;
        termios::cfmakeraw(&mut raw);
        Ok(termios::tcsetattr(io::stdin(), SetArg::TCSADRAIN, &raw)?)
    }

    /// Sets the terminal back for as long as this process is stopped.
    pub fn set_cooked(&self) {
        restore();
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
        *COOKED.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

fn restore() {
    // `try_lock`: a panic while the lock is held must not wait for itself.
    if let Ok(cooked) = COOKED.try_lock()
        && let Some(cooked) = cooked.as_ref()
    {
        // At once, and not when output has drained: a stopped terminal would keep us.
        let _ = termios::tcsetattr(io::stdin(), SetArg::TCSANOW, cooked);
    }
}

/// Columns and rows of the first of standard input, output and error that is a terminal with a size.
pub fn size() -> Option<(u16, u16)> {
    let (stdin, stdout, stderr) = (io::stdin(), io::stdout(), io::stderr());
    [stdin.as_fd(), stdout.as_fd(), stderr.as_fd()].into_iter().find_map(size_of)
}

fn size_of(fd: BorrowedFd<'_>) -> Option<(u16, u16)> {
    let mut size = libc::winsize { ws_row: 0, ws_col: 0, ws_xpixel: 0, ws_ypixel: 0 };
    // SAFETY: TIOCGWINSZ (tty_ioctl(4)) writes one `winsize`, which outlives the call; the descriptor is borrowed
    // and thus open.
    let done = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TIOCGWINSZ, &raw mut size) };
    (done == 0 && size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
