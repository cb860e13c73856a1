"""See lm_eval."""


class TaskManager:
    def __init__(self, verbosity=None, include_path=None):
        self.include_path = include_path
        self.all_tasks = ["first_word", "breaks", "large"]
