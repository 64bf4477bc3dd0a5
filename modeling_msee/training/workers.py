"""Data workers that outlive the SIGTERM of a whole job, so that the run can end its step and save."""

import multiprocessing.context
import os
import signal
import sys
import threading
import weakref
from multiprocessing.util import Finalize

from accelerate.data_loader import DataLoaderAdapter


if sys.platform == "linux":  # elsewhere there is no fork, or no way to tell who sent a signal

    class PatientWorker(multiprocessing.context.ForkProcess):
        """Leaves when the process that started it sends SIGTERM, and stays when anyone else does.

        PyTorch's own handler would end the worker, and with it the run. SIGTERM is blocked from before the fork, so
        that no moment of the start is unprotected; a thread waits for it, since Python's handlers hide the sender.
        """

        def start(self):
            Finalize(self, _end, [weakref.ref(self)], exitpriority=0)
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            try:
                super().start()  # the new process inherits what is blocked
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

        def run(self):
            threading.Thread(target=_leave_when_the_parent_asks, daemon=True).start()
            super().run()

    class PatientContext(multiprocessing.context.ForkContext):
        """Makes [`PatientWorker`]s."""

        Process = PatientWorker

    def _end(reference: weakref.ref[PatientWorker]) -> None:
        """Ask repeatedly, as the library does not: a SIGTERM that comes while another waits is lost."""
        worker = reference()
        if worker is None:
            return
        for _ in range(50):
            if not worker.is_alive():
                return
            worker.terminate()
            worker.join(0.1)
        worker.kill()  # it is stuck

    def _leave_when_the_parent_asks() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)  # as PyTorch's handler: the parent is leaving, nothing is to be said


def with_patient_workers(loader: DataLoaderAdapter) -> DataLoaderAdapter:
    """The same loader; on Linux its workers outlive a SIGTERM that is not its own.

    A loader that was told how to start its workers (`dataloader_multiprocessing_context`) stays as it is.
    """
    base = loader.base_dataloader
    if sys.platform == "linux" and base.num_workers > 0 and base.multiprocessing_context is None:
        base.multiprocessing_context = PatientContext()
    return loader
