"""A test marked `alone` runs beside no other, and is not passed for ever by those that are not."""

import threading

import turn


class Test:
    """In a thread, as a worker has it: it takes its turn, and leaves when told."""

    def __init__(self, folder, alone):
        self.came, self.may_go = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self.run, args=(folder, alone), daemon=True)
        self.thread.start()

    def run(self, folder, alone):
        with turn.taken(folder, alone=alone):
            self.came.set()
            self.may_go.wait(30)

    def leave(self):
        self.may_go.set()
        self.thread.join(30)


Test.__test__ = False


def test_alone_waits_for_all_and_all_who_come_later_wait_for_it(tmp_path):
    first, second = Test(tmp_path, False), Test(tmp_path, False)
    assert first.came.wait(30) and second.came.wait(30)  # beside each other
    quiet = Test(tmp_path, True)
    assert not quiet.came.wait(0.2)
    later = Test(tmp_path, False)
    first.leave()
    # it does not pass who waits to be alone
    assert not later.came.wait(0.2) and not quiet.came.is_set()
    second.leave()
    assert quiet.came.wait(30) and not later.came.wait(0.2)
    quiet.leave()
    assert later.came.wait(30)
    later.leave()


def test_without_a_folder_there_are_no_others():
    with turn.taken(None, alone=True), turn.taken(None, alone=True):
        pass
